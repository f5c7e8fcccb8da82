"""A model in any of the forms a user has it, as a torch module with its preprocessing and class names.

    torchvision:resnet50    timm:NAME    hf:NAME    path/file.py:function    package.module:function    FILE.pt2
    an nn.Module

``LOADERS`` is the table: one kind of model, one function.  torchvision and timm are imported by their own loader only.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pfungst import hub
from pfungst.domains import preprocessing
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import MissingExtra, ModelError, PfungstError, SettingError, first_line
from pfungst.weights import digest_module, put_weights, read_weights

_FORMS = (
    "give torchvision:NAME, timm:NAME, hf:NAME, path/file.py:function, package.module:function (a function without "
    "arguments that returns an nn.Module), or FILE.pt2 (torch.export)"
)
_LATER = {
    ".onnx": "ONNX",
    ".h5": "Keras",
    ".keras": "Keras",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be asked: in eval mode, on its device.

    ``name``: as the user named it.  ``classes``: names in the order of the outputs, if known.
    ``digest``: sha256 (hex) of parameters, buffers and structure.
    """

    module: nn.Module
    name: str
    preprocess: Preprocess | None
    classes: tuple[str, ...] | None
    digest: str


@dataclass(frozen=True)
class Loaded:
    """What a loader gives: the module, and what the model's own configuration knows."""

    module: nn.Module
    preprocess: Preprocess | None = None
    classes: Sequence[str] | None = None


def load_model(
    spec: str | nn.Module,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str | None = None,
    classes: Sequence[str] | str | Path | None = None,
) -> LoadedModel:
    """Load a model; ``size``, ``mean``, ``std``, ``channels`` and ``classes`` override what it says of itself.

    ``spec``: see the head of this file.  A module that is passed stays untouched: it must be in eval mode, and on
    ``device``.  ``weights``: .safetensors, .pt or .pth; without it torchvision and timm fetch their pretrained ones.
    ``size``: (height, width) or one number for both.  ``mean``, ``std``: one a channel, or one for all, of pixels in
    0 to 1; any value above 1 says that they are of pixels in 0 to 255.  ``channels``: RGB, BGR or L.
    ``classes``: the names in the order of the outputs, or a text file with one a line.

    Raises ModelError, SettingError, or MissingExtra where torchvision or timm is needed and cannot be imported.
    """
    target = _check_device(device)
    if isinstance(spec, nn.Module):
        if weights is not None:
            raise SettingError("weights would change the module you passed", "load them before, or pass a name")
        loaded, name = _from_module(spec, target), type(spec).__name__
    else:
        kind, rest = _kind_of(str(spec))
        loaded, name = LOADERS[kind](rest, weights, target), str(spec)
        if kind != "pt2":
            loaded.module.eval()
        _move(loaded.module, target)
    lazy = [key for key, value in loaded.module.named_parameters() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ModelError(f"the parameter {lazy[0]} has no shape yet", "call the model once, then save its weights")
    own = _own_preprocess(loaded, replaced=size is not None)
    names = _read_classes(classes) if classes is not None else loaded.classes
    return LoadedModel(
        module=loaded.module,
        name=name,
        preprocess=preprocessing.override(own, size, mean, std, channels),
        classes=None if names is None else tuple(map(str, names)),
        digest=digest_module(loaded.module),
    )


def _kind_of(spec: str) -> tuple[str, str]:
    """The kind of loader and what it is called with."""
    head, colon, rest = spec.partition(":")
    if colon and head in ("torchvision", "timm", "hf"):
        return head, rest
    suffix = Path(spec).suffix.lower()
    if suffix == ".pt2":
        return "pt2", spec
    if suffix in _LATER:
        raise ModelError(
            f"{_LATER[suffix]} models ({suffix}) are not supported yet: {spec}",
            "rebuild the model in torch, then torch.export.save(torch.export.export(model.eval(), (example,)), "
            "'model.pt2') and give model.pt2",
        )
    if suffix in (".pt", ".pth", ".safetensors", ".ckpt", ".bin"):
        raise ModelError(
            f"{spec} holds weights, which do not say what the model computes",
            f"name the architecture and give the file beside it, as in torchvision:resnet50 --weights {spec}",
        )
    place, colon, function = spec.rpartition(":")
    if colon and place and function.isidentifier():
        return ("file" if place.endswith(".py") else "module"), spec
    raise ModelError(f"{spec!r} names no model", _FORMS)


# --- loaders: (what follows the kind, weights file or None, device) -> Loaded -------------------------------


def _load_torchvision(name: str, weights: str | Path | None, device: torch.device) -> Loaded:
    models = _import_extra("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    pretrained = models.get_model_weights(name).DEFAULT
    preprocess = preprocessing.from_preset(pretrained.transforms())
    categories = pretrained.meta.get("categories")
    if weights is None:
        module = _download("torchvision", name, lambda: models.get_model(name, weights=pretrained))
        return Loaded(module, preprocess, categories)
    state = read_weights(weights)
    options = _torchvision_options(models, name, state, Path(weights))

    def build(**more: Any) -> nn.Module:
        with _quiet():
            return models.get_model(name, weights=None, **options, **more)

    count = _class_count(build, "num_classes", state, len(categories or ()))
    module = build(**count)
    put_weights(module, state, weights)
    side = getattr(module, "image_size", None)  # A vision transformer takes no other size than its own.
    if isinstance(side, int) and preprocess.size != (side, side):
        preprocess = preprocess.at_size((side, side))
    return Loaded(module, preprocess, None if count else categories)


def _torchvision_options(models: ModuleType, name: str, state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Arguments that follow from the weights, where their own names and shapes tell."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = any(key.lower().startswith("aux") for key in state)
        # The published weights want their input scaled anew inside the model, others (trained here) do not,
        # and the tensors cannot tell; the published files carry the beginning of their sha256 in their
        # name.
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        published = [Path(entry.url).stem.rpartition("-")[2] for entry in models.get_model_weights(name)]
        options["transform_input"] = any(content.startswith(start) for start in published)
    position, projection = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if name.startswith("vit_") and position is not None and projection is not None:
        options["image_size"] = round((position.shape[1] - 1) ** 0.5) * projection.shape[-1]
    return options


def _load_timm(name: str, weights: str | Path | None, device: torch.device) -> Loaded:
    timm = _import_extra("timm")
    data = _import_extra("timm.data")
    known = timm.list_models()
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and name.partition(".")[0] not in known:
        raise _unknown("timm", name, known)
    count: dict[str, int] = {}
    if weights is None:
        module = _download("timm", name, lambda: timm.create_model(name, pretrained=True))
    else:
        state = read_weights(weights)

        def build(**more: Any) -> nn.Module:
            try:
                return timm.create_model(name, pretrained=False, **more)
            except (RuntimeError, ValueError, OSError) as error:
                raise ModelError(f"timm cannot build {name}: {error}", "check the name") from error

        default = build()
        count = _class_count(build, "num_classes", state, int(getattr(default, "num_classes", 0)))
        module = build(**count) if count else default
        put_weights(module, state, weights)
    config = data.resolve_data_config({}, model=module)
    return Loaded(module, preprocessing.from_timm(config), None if count else _timm_classes(data, module))


def _timm_classes(data: ModuleType, module: nn.Module) -> list[str] | None:
    """timm's names of the ImageNet classes, where the model is one of those."""
    labels = (getattr(module, "pretrained_cfg", None) or {}).get("label_names")
    if labels:
        return list(labels)
    subset = data.infer_imagenet_subset(module)
    if not subset:
        return None
    info = data.ImageNetInfo(subset)
    if info.num_classes() != getattr(module, "num_classes", None):
        return None
    return [info.index_to_description(index) for index in range(info.num_classes())]


def _load_hf(name: str, weights: str | Path | None, device: torch.device) -> Loaded:
    return Loaded(*hub.load(name, weights))


def _load_file(spec: str, weights: str | Path | None, device: torch.device) -> Loaded:
    place, _, function = spec.rpartition(":")
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ModelError(f"the file {place} does not exist", _FORMS)
    name = f"_pfungst_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ModelError(f"{place} is not a Python file", _FORMS)
    with import_path(path.parent), _user_code(spec):
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # Dataclasses look their module up there while it runs.
        try:
            found.loader.exec_module(module)
            return _call(module, function, spec, weights)
        finally:
            sys.modules.pop(name, None)


def _load_module(spec: str, weights: str | Path | None, device: torch.device) -> Loaded:
    place, _, function = spec.rpartition(":")
    with import_path(Path.cwd()), _user_code(spec):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise ModelError(f"there is no module {error.name!r} for the model {spec}", _FORMS) from error
        return _call(module, function, spec, weights)


def _load_pt2(spec: str, weights: str | Path | None, device: torch.device) -> Loaded:
    if weights is not None:
        raise SettingError(f"{spec} holds its weights already", "leave out --weights")
    if not Path(spec).expanduser().is_file():
        raise ModelError(f"the file {spec} does not exist", _FORMS)
    try:
        program = torch.export.load(Path(spec).expanduser())
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # Damaged archives, other versions, unknown operators: each raises its own kind.
        why = first_line(error)
        raise ModelError(
            f"{spec} cannot be loaded as an exported program: {why}",
            "save it anew with torch.export.save and this version of torch",
        ) from error
    training = [node.name for node in program.graph.nodes if _trains(node)]
    if training:
        raise ModelError(
            f"{spec} was exported in training mode ({training[0]})", "call model.eval() before torch.export.export"
        )
    return Loaded(module)


LOADERS: dict[str, Callable[[str, str | Path | None, torch.device], Loaded]] = {
    "torchvision": _load_torchvision,
    "timm": _load_timm,
    "hf": _load_hf,
    "file": _load_file,
    "module": _load_module,
    "pt2": _load_pt2,
}


# --- what the loaders share ---------------------------------------------------------------------------------


def _from_module(module: nn.Module, device: torch.device) -> Loaded:
    nodes = list(module.graph.nodes) if isinstance(module, torch.fx.GraphModule) else []
    if any(isinstance(node.target, torch._ops.OpOverload) for node in nodes):
        training = [node.name for node in nodes if _trains(node)]  # An exported program has no modes.
    else:
        training = [name for name, part in module.named_modules() if part.training]
    if training:
        where = f"its part {training[0]}" if training[0] else "the model"
        raise ModelError(f"{where} is in training mode, where outputs are random or change it", "model.eval()")
    elsewhere = [tensor for tensor in (*module.parameters(), *module.buffers()) if not _same(tensor.device, device)]
    if elsewhere:
        raise ModelError(
            f"the model is on {elsewhere[0].device}, and the device is {device}",
            f"model.to({str(device)!r}), or device={str(elsewhere[0].device)!r}",
        )
    return Loaded(module, getattr(module, "preprocess", None), _known_classes(module))


def _call(module: ModuleType, name: str, spec: str, weights: str | Path | None) -> Loaded:
    """The model that a user's function returns, with what it or the function knows of itself."""
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isroutine(value) and key[0] != "_"]
        raise ModelError(f"there is no function {name!r} for the model {spec}{_close(name, known)}", _FORMS)
    built = function()
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{spec} returns {type(built).__name__}, not an nn.Module", "return the model from the function"
        )
    if weights is not None:
        put_weights(built, read_weights(weights), weights)
    own = getattr(built, "preprocess", None)
    classes = _known_classes(built) or _known_classes(function)
    return Loaded(built, getattr(function, "preprocess", None) if own is None else own, classes)


def _known_classes(owner: Any) -> list[str] | None:
    names = getattr(owner, "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


@contextlib.contextmanager
def _user_code(spec: str) -> Iterator[None]:
    """Whatever a user's own file raises becomes a ModelError that names the place."""
    try:
        yield
    except PfungstError:
        raise
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        at = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
        raise ModelError(
            f"building the model {spec} failed: {type(error).__name__}: {error}{at}",
            "call the function by itself in Python, and mend what it raises",
        ) from error


@contextlib.contextmanager
def import_path(folder: Path) -> Iterator[None]:
    """Modules of the folder can be imported meanwhile."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # torchvision warns of its own future defaults whenever an Inception is built.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _import_extra(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torchvision", "timm"):
            raise MissingExtra(f"{package} cannot be imported: {error}", f"install {error.name}") from error
        raise MissingExtra(
            f"{error.name.partition('.')[0]} is not installed", "pip install 'pfungst[vision]'"
        ) from error
    except Exception as error:  # A build for another torch fails with RuntimeError, OSError or AttributeError.
        raise MissingExtra(
            f"{package} is installed but cannot be imported: {error}",
            f"install the torchvision that belongs to torch {torch.__version__}: pip install 'pfungst[vision]'",
        ) from error


def _download(library: str, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with _quiet():
            return build()
    except Exception as error:  # Network, proxy, disk, checksum, "no pretrained weights": many kinds.
        why = first_line(error)
        raise ModelError(
            f"the pretrained weights of {library}:{name} cannot be had: {type(error).__name__}: {why}",
            "fetch them where there is a network and give --weights FILE",
        ) from error


def _class_count(
    build: Callable[..., nn.Module], argument: str, state: dict[str, torch.Tensor], default: int
) -> dict[str, int]:
    """The argument that gives the model as many outputs as the weights have; empty where that is the default.

    The parameters of the last layer are those whose shape depends on the argument: no name has to be guessed.
    """
    shapes = []
    for count in (default, default + 1):
        try:
            with torch.device("meta"):
                shapes.append({key: value.shape for key, value in build(**{argument: count}).state_dict().items()})
        except NotImplementedError:  # Some models compute with values while they are built.
            shapes.append({key: value.shape for key, value in build(**{argument: count}).state_dict().items()})
    last = [key for key, shape in shapes[0].items() if shape != shapes[1].get(key)]
    counts = {state[key].shape[0] for key in last if key in state and state[key].ndim}
    return {argument: counts.pop()} if len(counts) == 1 and counts != {default} else {}


def _own_preprocess(loaded: Loaded, replaced: bool) -> Preprocess | None:
    own: Any = loaded.preprocess
    if own is None or isinstance(own, Preprocess):
        return own
    if all(hasattr(own, name) for name in ("crop_size", "resize_size", "mean", "std")):
        return preprocessing.from_preset(own)
    if callable(own) and replaced:
        return None  # The flags say it all; a method of that name may well be for something else.
    if callable(own):
        return preprocessing.from_callable(own)
    raise ModelError(
        f"the model's own preprocess is {type(own).__name__}, which is not callable",
        "`preprocess` is a function of a PIL image, a pfungst Preprocess, or a torchvision preset",
    )


def _read_classes(classes: Sequence[str] | str | Path) -> list[str]:
    if not isinstance(classes, (str, Path)):
        if not isinstance(classes, Sequence):
            raise SettingError(f"classes is {classes!r}", "give the names in a list, or a text file with one a line")
        names = [str(name) for name in classes]
    else:
        try:
            names = [line.strip() for line in Path(classes).expanduser().read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"the class names {classes} cannot be read: {error}", "one name a line") from error
        while names and not names[-1]:
            names.pop()
    if not names:
        raise SettingError("there are no class names", "give the names in the order of the model's outputs")
    return names


def _check_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        raise SettingError(f"the device {device} cannot be used: {why}", "give --device cpu") from error
    return target


def _move(module: nn.Module, device: torch.device) -> None:
    if any(not _same(tensor.device, device) for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _trains(node: torch.fx.Node) -> bool:
    """Whether a call of an exported graph is a dropout or batch norm in training mode."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    values = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    values.update(node.kwargs)
    return values.get("train") is True or values.get("training") is True


def _unknown(library: str, name: str, known: Sequence[str]) -> ModelError:
    return ModelError(f"{library} has no model {name!r}{_close(name, known)}", f"list them: {library}.list_models()")


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; close: {', '.join(close)}" if close else ""
