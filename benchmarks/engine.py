"""What one explanation costs: time and peak memory of gradient x input, of pfungst's presets and of other engines.

    python benchmarks/engine.py                                    # all models and methods
    python benchmarks/engine.py --models vgg16 --methods pfungst:epsilon-plus zennit:epsilon-plus --batch 1
    python benchmarks/engine.py --packages ../rivals/lib/python3.11/site-packages   # where captum and lxt are

Each (model, method) has a process of its own, since some engines patch torch for good.  The processes take turns, one
explanation each, so that a busy machine slows all of them alike: ``ratio`` is the median over the turns of a method's
time over that of gradient x input in the same turn.  ``memory`` is the highest level of the process (of the GPU) above
that after loading the model.  Models have random weights, batch norms the statistics of one batch, and no parameter
asks for a gradient.  ``@channels_last``, ``@bfloat16`` and ``@compile`` behind a method's name change how it runs.

Rows go to benchmarks/results/engine_HARDWARE_torchVERSION.csv; rows of other models and methods there are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.lrp import LRP, PRESETS

Explain = Callable[[Tensor], Tensor]  # inputs (n, 3, size, size) -> map of the greatest output of each, same shape

BASE = "gradient x input"
# name -> (torchvision's function, size of the input, arguments)
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vgg16": ("vgg16", 224, {}),
    "resnet50": ("resnet50", 224, {}),
    "inception_v3": ("inception_v3", 299, {"aux_logits": False, "init_weights": True}),
    "densenet121": ("densenet121", 224, {}),
    "mobilenet_v3": ("mobilenet_v3_large", 224, {}),
    "convnext_t": ("convnext_tiny", 224, {}),
    "vit_b_16": ("vit_b_16", 224, {}),
    "swin_t": ("swin_t", 224, {}),
}
COMPOSITES = {
    "epsilon-plus": "EpsilonPlus",
    "epsilon-plus-flat": "EpsilonPlusFlat",
    "epsilon-alpha2-beta1": "EpsilonAlpha2Beta1",
    "epsilon-alpha2-beta1-flat": "EpsilonAlpha2Beta1Flat",
}
METHODS = (
    BASE,
    *(f"pfungst:{name}" for name in PRESETS),
    *(f"zennit:{name}" for name in COMPOSITES),
    "captum:lrp",
    "lxt:cp-lrp",
)
DEFAULT_METHODS = tuple(m for m in METHODS if not m.startswith("zennit:") or m == "zennit:epsilon-plus")
VARIANTS = ("channels_last", "bfloat16", "compile")
FIELDS = (
    "model", "method", "version", "batch", "device", "threads", "torch", "repeats",
    "seconds", "ratio", "memory_mib", "memory_ratio", "skipped",
)  # fmt: skip


# ---- models --------------------------------------------------------------------------------------------------------


def import_torchvision() -> Any:
    """torchvision.  A build for another torch, whose operators cannot be loaded, lacks two that its import asks for:
    they are declared here, and never called."""
    spec = importlib.util.find_spec("torchvision")
    if spec is not None and not hasattr(torch.ops.torchvision, "nms"):
        for compiled in Path(str(spec.origin)).parent.glob("_C*"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(compiled))
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # type: ignore[attr-defined]  # operators live as long as the object
    import torchvision

    return torchvision


def build(name: str, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights and sane values, and its input."""
    function, size, arguments = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision().models, function)(weights=None, **arguments).eval()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if path.endswith("layer_scale"):  # ConvNeXt: as made, its blocks compute next to nothing
            parameter.fill_(0.3)
        elif parameter.dim() > 1 and not bool(parameter.any()):  # the head of a ViT
            parameter.normal_(0, 0.02)
    x = torch.randn(batch, 3, size, size)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches seen, which is one
        norm.train()
    if norms:
        with torch.no_grad():
            model(torch.randn(2, 3, size, size))
    return model.eval().to(device), x.to(device)


# ---- methods -------------------------------------------------------------------------------------------------------


def gradient_times_input(model: nn.Module) -> Explain:
    """The yardstick: forward, backward of the greatest output, times the input."""

    def explain(x: Tensor) -> Tensor:
        source = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(source).amax(1).sum(), source)
        return gradient * x

    return explain


def pfungst(model: nn.Module, preset: str) -> Explain:
    """One of our presets; bounds wide enough for normal noise, for z^B."""
    lrp = LRP(model, preset, bounds=(-7.0, 7.0))
    return lambda x: lrp(x).scores


def zennit(model: nn.Module, preset: str, name: str) -> Explain:
    """The composite of that name with the canonizer the model needs, registered once, before the clock runs."""
    from zennit import composites
    from zennit.canonizers import MergeBatchNorm, SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer

    class MergeInDenseNet(MergeBatchNorm):
        """zennit has no canonizer for it: merge the norms that directly follow a convolution, leave the others."""

        def apply(self, root_module: nn.Module) -> list[Any]:
            pairs = [(root_module.features.conv0, root_module.features.norm0)]  # type: ignore[union-attr]
            pairs += [(m.conv1, m.norm2) for m in root_module.modules() if hasattr(m, "norm2")]  # type: ignore[misc]
            merged = [MergeInDenseNet() for _ in pairs]
            for one, (convolution, norm) in zip(merged, pairs, strict=True):
                one.register((convolution,), norm)
            return merged

        def copy(self) -> MergeBatchNorm:
            return MergeInDenseNet()

    canonizer = {"resnet50": ResNetCanonizer, "densenet121": MergeInDenseNet}.get(name, SequentialMergeBatchNorm)
    composite = getattr(composites, COMPOSITES[preset])(canonizers=[canonizer()])
    composite.register(model)

    def explain(x: Tensor) -> Tensor:
        source = x.detach().requires_grad_()
        output = model(source)
        top = output.detach()
        seed = torch.where(top == top.amax(1, keepdim=True), top, 0)
        (relevance,) = torch.autograd.grad(output, source, seed)
        return relevance

    return explain


def captum(model: nn.Module) -> Explain:
    """captum.attr.LRP: epsilon for the layers it knows.  Its hooks do not bear in-place activations."""
    from captum import attr

    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]

    def explain(x: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(x).argmax(1)
        relevance: Tensor = attr.LRP(model).attribute(x.detach().requires_grad_(), target=target)
        return relevance.detach()

    return explain


def lxt(model: nn.Module, name: str) -> Explain:
    """LXT's map for torchvision's ViT (the only one of our models it has): gradient x input of the patched model."""
    if name != "vit_b_16":
        raise NotImplementedError("lxt has patches for torchvision's ViT only")
    from lxt.efficient import monkey_patch
    from lxt.efficient.models.vit_torch import cp_LRP
    from torchvision.models import vision_transformer

    monkey_patch(vision_transformer, cp_LRP)
    return gradient_times_input(model)


def method(label: str, name: str, model: nn.Module) -> Explain:
    """The function that ``label`` ("pfungst:epsilon-plus@compile") stands for."""
    engine, _, rest = label.partition("@")[0].partition(":")
    if engine == BASE:
        explain = gradient_times_input(model)
    elif engine == "pfungst":
        explain = pfungst(model, rest)
    elif engine == "zennit":
        explain = zennit(model, rest, name)
    else:
        explain = captum(model) if engine == "captum" else lxt(model, name)
    return torch.compile(explain) if "@compile" in label else explain


def version_of(label: str) -> str:
    """Version of the package behind a method."""
    package = "torch" if label.startswith(BASE) else label.partition(":")[0]
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---- one process a (model, method) ---------------------------------------------------------------------------------


def peak_memory(device: str, reset: bool = False) -> int:
    """Highest memory level so far, in bytes; with ``reset`` the present level, from which a new peak counts."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak since the process began
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what loading freed must not be there to be used for free
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from the present level
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def work(task: dict[str, Any]) -> None:
    """The worker: load, say so, then explain once for every line that comes in, and answer with time and memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        sys.path.extend(task["packages"])
        torch.set_num_threads(task["threads"])
        device, label = task["device"], task["method"]
        model, x = build(task["model"], task["batch"], device)
        if "@channels_last" in label:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        if "@bfloat16" in label:
            model, x = model.bfloat16(), x.bfloat16()
        explain = method(label, task["model"], model)
        gc.collect()
        level = peak_memory(device, reset=True)
        finite = bool(explain(x).isfinite().all())  # not timed: first calls choose algorithms
        answer(ready=True, note="" if finite else "map is not finite")
        for _ in sys.stdin:
            start = time.perf_counter()
            explain(x)
            if device == "cuda":
                torch.cuda.synchronize()
            answer(seconds=time.perf_counter() - start, memory=peak_memory(device) - level)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


@dataclass
class Worker:
    """The parent's end of one process, and what it measured."""

    label: str
    process: subprocess.Popen[str]
    skipped: str
    seconds: list[float]
    memory: int = 0

    def ask(self) -> dict[str, Any]:
        """The next answer; a process that died, for want of memory say, counts as an error."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def turn(self) -> None:
        """One explanation."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        result = self.ask()
        if "error" in result:
            self.skipped = result["error"]
        else:
            self.seconds.append(result["seconds"])
            self.memory = max(self.memory, result["memory"])


def start(label: str, name: str, arguments: argparse.Namespace) -> Worker:
    """A process that loads the model and explains once."""
    task = {
        "model": name, "method": label, "batch": arguments.batch, "device": arguments.device,
        "threads": arguments.threads, "packages": [str(path) for path in arguments.packages],
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if arguments.verbose else subprocess.DEVNULL,
        text=True,
    )
    return Worker(label, process, "", [])


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    workers = [start(label, name, arguments) for label in (BASE, *(m for m in arguments.methods if m != BASE))]
    for worker in workers:  # they load side by side; turns begin when the last is ready
        result = worker.ask()
        worker.skipped = result.get("error", "") or result.get("note", "")
    for _ in range(arguments.repeats):
        for worker in workers:
            if not worker.skipped:
                worker.turn()
    base = workers[0]
    rows = []
    for worker in workers:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()
        row = {
            "model": name, "method": worker.label, "version": version_of(worker.label), "batch": arguments.batch,
            "device": hardware(arguments.device), "threads": arguments.threads, "torch": torch.__version__,
            "repeats": arguments.repeats, "skipped": worker.skipped,
        }  # fmt: skip
        if worker.seconds and not worker.skipped:
            row["seconds"] = f"{statistics.median(worker.seconds):.4f}"
            row["memory_mib"] = f"{worker.memory / 2**20:.1f}"
            if base.seconds:
                turns = zip(worker.seconds, base.seconds, strict=True)
                row["ratio"] = f"{statistics.median(mine / its for mine, its in turns):.2f}"
                row["memory_ratio"] = f"{worker.memory / max(base.memory, 1):.2f}"
        rows.append(row)
    return rows


# ---- the table -----------------------------------------------------------------------------------------------------


def hardware(device: str) -> str:
    """The model of the processor or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def table_path(device: str) -> Path:
    """The CSV of this hardware and torch."""
    words = "".join(c if c.isalnum() else " " for c in hardware(device).lower()).split()
    return Path(__file__).parent / "results" / f"engine_{'-'.join(words)}_torch{torch.__version__}.csv"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the rows into the table, in the place of older ones of the same model, method, batch and threads."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[field]) for field in ("model", "method", "batch", "threads"))

    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as handle:
            known = {key(row): row for row in csv.DictReader(handle)}
    known.update({key(row): row for row in rows})
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        writer.writeheader()
        writer.writerows(known.values())
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="samples in one call (4 on a CPU, 128 on a GPU)")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the medians are over these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--packages", type=Path, nargs="*", default=[], help="folders to import captum and lxt from")
    parser.add_argument("--out", type=Path, help="the CSV, by default named by hardware and torch")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    arguments.batch = arguments.batch or (128 if arguments.device == "cuda" else 4)
    for label in arguments.methods:
        plain, _, variant = label.partition("@")
        if plain not in METHODS or (variant and variant not in VARIANTS):
            parser.error(
                f"method {label!r}: it is one of {', '.join(METHODS)}, with @{', @'.join(VARIANTS)} or without"
            )
    print(f"{hardware(arguments.device)}, {arguments.threads} threads, torch {torch.__version__}, "
          f"batch {arguments.batch}")  # fmt: skip
    print(f"{'model':14}{'method':36}{'seconds':>9}{'ratio':>7}{'MiB':>9}{'ratio':>7}")
    for name in arguments.models:
        rows = measure(name, arguments)
        for row in rows:
            numbers = "".join(
                f"{row.get(field, ''):>{width}}"
                for field, width in (("seconds", 9), ("ratio", 7), ("memory_mib", 9), ("memory_ratio", 7))
            )
            print(f"{name:14}{row['method']:36}{('  skipped: ' + row['skipped'])[:120] if row['skipped'] else numbers}")
        write(arguments.out or table_path(arguments.device), rows)
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    main()
