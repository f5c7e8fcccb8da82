"""Does the engine explain every vision model?  One row a model: output unchanged, ledger closed, no unknown function.

Every classification, video and segmentation model of torchvision and the smallest model of each of timm's modules,
with random weights and small inputs.  ``python benchmarks/model_families.py`` writes
``benchmarks/results/model_families.csv``; ``--names tv:resnet18 timm:vit_tiny_patch16_224`` runs some of them.
The preset is ``auto``: epsilon-plus, or cp-lrp-gamma for models with attention or layer norms.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from engine import import_torchvision  # the script beside this one
from torch import Tensor, nn

from pfungst.lrp import LRP

# Models of torchvision that need another input than (1, 3, 64, 64), and why.
SHAPES = {
    "inception_v3": (3, 96, 96),
    "vit_b_16": (3, 224, 224), "vit_b_32": (3, 224, 224), "vit_l_16": (3, 224, 224), "vit_l_32": (3, 224, 224),
    "vit_h_14": (3, 224, 224), "maxvit_t": (3, 224, 224),
    "mc3_18": (3, 4, 32, 32), "r3d_18": (3, 4, 32, 32), "r2plus1d_18": (3, 4, 32, 32), "s3d": (3, 16, 224, 224),
    "mvit_v1_b": (3, 16, 224, 224), "mvit_v2_s": (3, 16, 224, 224),
    "swin3d_t": (3, 4, 64, 64), "swin3d_s": (3, 4, 64, 64), "swin3d_b": (3, 4, 64, 64),
}  # fmt: skip


# Models that compute in float32 on the way, whatever the type of their input: the ledger of float64 closes to that.
SINGLE_INSIDE = {"timm:efficientvit_b0": "its linear attention"}

OUT = Path(__file__).parent / "results" / "model_families.csv"

# The smallest model of each of timm 1.0.31's modules, by parameters.
TIMM = [
    "beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c",
    "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "test_efficientnet",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b",
    "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0",
    "test_mambaout", "test_coatnet", "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050",
    "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "nest_tiny", "nextvit_small", "test_nfnet", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "test_resnet",
    "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small",
    "vgg11", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos",
    "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception",
    "xception41p", "xcit_nano_12_p8_224",
]  # fmt: skip


@dataclass
class Row:
    """``gap``: |f - Σ R - absorbed| / |f| for the greatest output; ``change``: greatest |output - the model's own|."""

    model: str
    parameters: int
    preset: str
    dtype: str
    gap: float = float("nan")
    change: float = float("nan")
    seconds: float = float("nan")
    nodes: int = 0
    problem: str = ""

    @property
    def passed(self) -> bool:
        double = 1e-7 if self.model in SINGLE_INSIDE else 1e-9
        return not self.problem and self.change == 0 and self.gap <= {"float32": 1e-4, "float64": double}[self.dtype]


class Scores(nn.Module):
    """The one tensor of scores (n, classes) of a model of any kind: the logits, or the mean over a map of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.model(x)
        y = y["out"] if isinstance(y, dict) else y
        y = y[0] if isinstance(y, tuple | list) else y
        return y.flatten(2).mean(2) if y.dim() > 2 else y


def torchvision_names() -> list[str]:
    """Classification, video and segmentation models; the quantised and the detection models are others."""
    from torchvision import models

    parts = (models, models.video, models.segmentation)
    names = [name for part in parts for name in models.list_models(module=part)]
    return [f"tv:{name}" for name in names]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights in eval mode, and an input for it."""
    torch.manual_seed(0)
    library, _, bare = name.partition(":")
    if library == "tv":
        from torchvision import models

        extra = {"weights_backbone": None} if bare in models.list_models(module=models.segmentation) else {}
        extra |= {"init_weights": True} if bare in ("googlenet", "inception_v3") else {}
        model = models.get_model(bare, weights=None, **extra)
        shape = SHAPES.get(bare, (3, 64, 64))
    else:
        import timm

        model = timm.create_model(bare, pretrained=False)
        shape = model.pretrained_cfg.get("input_size", (3, 224, 224))
        if not model.pretrained_cfg.get("fixed_input_size", False):
            smaller = model.pretrained_cfg.get("min_input_size") or (3, *(min(s, 128) for s in shape[1:]))
            shape = smaller
    return Scores(model.eval()), torch.randn(2 if sum(p.numel() for p in model.parameters()) < 3e7 else 1, *shape)


def check(name: str, preset: str = "auto", dtype: torch.dtype = torch.float32, built: Any = None) -> Row:
    """Explain one model (``built``: it and its input, if they are there already)."""
    model, x = built or build(name)
    size = sum(p.numel() for p in model.parameters())
    row = Row(name, size, preset, str(dtype).removeprefix("torch."))
    try:
        model, x = model.to(dtype), x.to(dtype)
        calibrate(model, x)
        with torch.no_grad():
            expected = model(x)
        # Attention of torch has other kernels where gradients are asked for, which round otherwise.
        asked = model(x.clone().requires_grad_()).detach()
        start = time.perf_counter()
        lrp = LRP(model, preset)
        result = lrp(x)
        row.preset = lrp.preset.name
        row.seconds = round(time.perf_counter() - start, 2)
        total = result.scores.flatten(1).sum(1, dtype=torch.float64) + result.absorbed
        f = result.explained.double()
        row.gap = float(((f - total).abs() / f.abs()).max())
        row.change = min(float((result.output - own).abs().max()) for own in (expected, asked))
        row.nodes = len(result.ledger)
        if not bool(result.scores.isfinite().all()):
            row.problem = "NaN or infinite relevance"
        if float(result.scores.abs().max()) == 0:
            row.problem = "no relevance at all"
    except Exception as error:
        row.problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if "--trace" in sys.argv:
            traceback.print_exc()
    return row


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Let batch norms take their statistics from the input, and give weights that start at zero a value.

    So random networks have values of order one, and none is a constant.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        try:
            with torch.no_grad():
                model(torch.cat([x, x.flip(-1) * 0.5]))
        except ValueError:  # one value a channel has no deviation: the untrained statistics serve as well
            pass
    for norm in norms:
        norm.eval()
        if norm.running_var is not None:
            norm.running_var.clamp_(min=1e-2)


def main() -> Iterator[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", help="models, as tv:NAME or timm:NAME (default: all)")
    parser.add_argument("--preset", nargs="*", default=["auto"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "float64"])
    parser.add_argument("--max-parameters", type=float, default=1e8, help="greater models run in float32 only")
    parser.add_argument("--library", choices=("tv", "timm"), help="only torchvision's or only timm's")
    parser.add_argument("--trace", action="store_true", help="print the traceback of errors")
    options = parser.parse_args()
    names = options.names or [*torchvision_names(), *(f"timm:{name}" for name in TIMM)]
    names = [name for name in names if options.library in (None, name.partition(":")[0])]
    for number, name in enumerate(names, 1):
        for preset in options.preset:
            for dtype in options.dtype:
                built = build(name)
                size = sum(p.numel() for p in built[0].parameters())
                if size > options.max_parameters and dtype == "float64":
                    continue
                row = check(name, preset, getattr(torch, dtype), built)
                del built
                mark = "ok  " if row.passed else "FAIL"
                print(f"{number}/{len(names)} {mark} {name} {preset} {dtype} gap={row.gap:.1e} change={row.change:.1e} "
                      f"{row.seconds:.1f}s {row.problem}", flush=True)  # fmt: skip
                yield row
                gc.collect()


def write(rows: list[Row], path: Path) -> None:
    """The table; rows of other models that it holds already stay."""
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    new = [asdict(row) for row in rows]
    done = {(row["model"], row["dtype"]) for row in new}
    table = [row for row in old if (row["model"], row["dtype"]) not in done] + new
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda row: (row["model"], row["dtype"])))


if __name__ == "__main__":
    import_torchvision()
    rows = []
    for row in main():
        rows.append(row)
        write(rows, OUT)
    print(f"{sum(row.passed for row in rows)} of {len(rows)} passed")
