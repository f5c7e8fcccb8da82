"""A finished run taken up again from its folder: model and pictures loaded anew, a finding tested once more."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pfungst.confirmations import Confirmation
from pfungst.domains.image import ImageData
from pfungst.errors import DataError, ModelError, RunError, SettingError
from pfungst.guards import Guard, write_guard
from pfungst.judgements import find_any
from pfungst.lrp.preset_files import preset
from pfungst.maps import Progress, prepare
from pfungst.models import LoadedModel, import_path, load_model
from pfungst.pipeline import Audit, digest_given, make_settings
from pfungst.placements import Placement
from pfungst.settings import Settings
from pfungst.store import Run


def reopen(
    path: str | Path,
    *,
    model: str | nn.Module | LoadedModel | None = None,
    weights: str | None = None,
    images: str | Path | None = None,
    device: str | None = None,
) -> Audit:
    """A finished audit from its run folder, with model and pictures loaded again, to go on working with it.

    model, weights  another model, or the same where its name in ``run.json`` does not suffice (a module passed)
    images          where the pictures are now, if they were moved
    device          where the model runs; as in the audit by default

    Relative names of files count from the folder in which the audit was begun, where they are there; the run's own
    model is built with that as the working folder, since its code may read files beside it.

    Raises RunError where the run is not finished, or its model has changed and ``model`` does not say that it may.
    """
    run = Run(path)
    description = run.describe()
    run.check_finished()
    settings = make_settings({**description["settings"], **({"device": device} if device else {})})
    settings = _find_files(settings, description)
    if model is not None or weights is not None:  # where the subject's model is from, now
        settings = replace(settings, weights=weights)
    if model is None:
        loaded = _load_own(description, weights, settings)
    else:
        loaded = load_again(model, weights, settings)
    if model is None and loaded.digest != description["model"]["digest"]:
        raise RunError(
            f"the model {loaded.name} is not the one that {path} was made with (its digest differs)",
            "restore it, give its --weights, or give --model to say that another one is meant",
        )
    data = _listed_pictures(run, description, loaded, images)
    subject = prepare(loaded, data, settings)
    if subject.given is not None:
        known = description["relevance"]["digest"]
        if digest_given(subject, lambda stage, done, total: None) != known:
            raise RunError(f"{settings.relevance} holds other maps than {path} was made of", "restore the file")
    return Audit(run, subject)


def _folder_of(description: dict[str, Any]) -> Path | None:
    """The folder in which an audit was begun, where it is there and not this one; older runs do not say it."""
    folder = description.get("folder")
    return Path(folder) if folder and Path(folder).is_dir() and Path(folder) != Path.cwd() else None


def _find_files(settings: Settings, description: dict[str, Any]) -> Settings:
    """The settings with names of files as they are found from here: in the audit's folder, else in this one."""
    folder = _folder_of(description)
    if folder is None:
        return settings
    found: dict[str, Any] = {}
    for key in ("weights", "classes", "relevance"):
        name = getattr(settings, key)
        for start in () if name is None else (Path.cwd(), folder):
            place = start / Path(name).expanduser()
            found |= {key: str(place)} if place.exists() else {}
    return replace(settings, **found)


def _load_own(description: dict[str, Any], weights: str | None, settings: Settings) -> LoadedModel:
    """The run's own model, built as in the audit; its name absolute where that was begun in another folder."""
    name, folder = description["model"]["name"], _folder_of(description)
    file = _file_of(name)
    if folder is None or (file and not (folder / Path(file).expanduser()).is_file()):
        return load_again(name, weights, settings, own=True)
    weights = None if weights is None else str(Path(weights).expanduser().absolute())
    with contextlib.chdir(folder), import_path(folder):
        loaded = load_again(name, weights, settings, own=True)
        return replace(loaded, name=_full_name(name))


def _file_of(name: str) -> str:
    """The file that a model's name names: FILE.pt2, FILE.py of FILE.py:function; "" where it names none."""
    place = name if name.endswith(".pt2") else name.rpartition(":")[0]
    return place if place.endswith((".py", ".pt2")) else ""


def _full_name(name: str) -> str:
    """A model's name with its file or folder absolute."""
    file, (kind, _, folder) = _file_of(name), name.partition(":")
    if file:
        return f"{Path(file).expanduser().absolute()}{name.removeprefix(file)}"
    if kind == "hf" and Path(folder).expanduser().is_dir():
        return f"hf:{Path(folder).expanduser().absolute()}"
    return name


def load_again(
    model: str | nn.Module | LoadedModel, weights: str | None, settings: Settings, own: bool = False
) -> LoadedModel:
    """A model beside a run's, or its ``own``; where a model does not say how pictures are prepared, as the run did."""
    if isinstance(model, LoadedModel):
        return model
    spec = model if isinstance(model, str) else ""
    published = spec.startswith(("torchvision:", "timm:", "hf:")) and not own
    how = {} if published else {key: getattr(settings, key) for key in ("size", "mean", "std", "channels", "classes")}
    try:
        return load_model(model, weights=weights or (settings.weights if own else None), device=settings.device, **how)
    except ModelError as error:
        if own and ":" not in spec and not spec.endswith(".pt2"):
            raise RunError(f"the run's model was passed from Python ({spec})", "give --model and --weights") from error
        file = _file_of(spec)
        if own and file and not Path(file).expanduser().is_file():
            raise ModelError(
                f"the run's model {spec} is not in {Path.cwd()}",
                f"go to the folder where the audit was made, or say where it is now: --model PLACE/{Path(spec).name}",
            ) from error
        raise


def _listed_pictures(run: Run, description: dict[str, Any], model: LoadedModel, images: str | Path | None) -> ImageData:
    """The run's pictures as ``samples.parquet`` lists them, so that manifests and limits need not be known again."""
    import pyarrow.parquet as pq

    table = pq.read_table(run.path / "samples.parquet", columns=["id", "path", "label"]).to_pydict()
    classes = description["data"]["classes"]
    root = Path(description["data"]["root"] if images is None else images)
    paths = [Path(path) for path in table["path"]] if images is None else [root / name for name in table["id"]]
    if not any(path.exists() for path in paths):
        raise DataError(f"the pictures of the run are not there: {paths[0]}", "give --images with their folder")
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([-1 if name is None else index[name] for name in table["label"]], dtype=np.int64)
    return ImageData(tuple(table["id"]), tuple(paths), labels, tuple(classes), None, root)


def confirm_again(
    path: str | Path,
    finding: str,
    *,
    model: str | None = None,
    weights: str | None = None,
    images: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    samples: int | None = None,
    also: Sequence[str] = (),
    also_weights: Sequence[str] = (),
    also_preset: Sequence[str] = (),
    where: Sequence[str] = (),
) -> Confirmation:
    """``pfungst confirm``: the finding of a run folder tested again; see ``reopen`` and ``confirmations.confirm``."""
    if also_weights and len(also_weights) != len(also):
        raise SettingError(f"{len(also)} times --also, {len(also_weights)} times --also-weights", "give one for each")
    for name in also_preset:
        preset(name)  # an error before the model is loaded
    find_any(Run(path), finding)  # before the model is loaded
    opened = reopen(path, model=model, weights=weights, images=images, device=device)
    settings = opened.subject.settings
    others = []
    for name, path_of_weights in zip(also, also_weights or (None,) * len(also), strict=True):
        loaded = load_again(name, path_of_weights, settings)
        # Two models of one architecture are told from each other by their weights.
        others.append(replace(loaded, name=f"{name} with {path_of_weights}") if path_of_weights else loaded)
    return opened.find(finding).confirm(seed, samples, presets=also_preset, models=others, folders=where)


def place_pictures(
    path: str | Path,
    pictures: str | Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    images: str | None = None,
    device: str | None = None,
    target: str = "auto",
    progress: Progress | None = None,
) -> list[Placement]:
    """``pfungst place``: new pictures on a finished run; see ``reopen`` and ``placements.place_samples``."""
    opened = reopen(path, model=model, weights=weights, images=images, device=device)
    return opened.place(pictures, progress, target)


def guard_finding(
    path: str | Path,
    finding: str,
    out: str | Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    images: str | None = None,
    device: str | None = None,
    count: int = 16,
    seed: int | None = None,
) -> Guard:
    """``pfungst guard``: a test for the cue of a run's finding; see ``reopen`` and ``guards.write_guard``."""
    record = find_any(Run(path), finding)
    opened = reopen(path, model=model, weights=weights, images=images, device=device)
    return write_guard(opened.run, opened.subject, record, out, count=count, seed=seed)
