"""Model + images -> relevance maps, pooled and kept for every sample (the first arrow of the story)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.domains.image import ImageData, Preprocess, load_batch, read_images
from pfungst.domains.labels import shorten, spread_rows
from pfungst.domains.preprocessing import SIZE_REMEDY
from pfungst.errors import DataError, ModelError, PfungstError
from pfungst.imports import RelevanceFile, open_relevance
from pfungst.lrp import LRP, Relevance
from pfungst.lrp.traces import Trace
from pfungst.models import LoadedModel, load_model
from pfungst.properties import FILED, measure_pixels
from pfungst.readers import Batch, read_ahead
from pfungst.regions import Laboratory
from pfungst.settings import Settings
from pfungst.store import BLOCK, NOT_READ, READ, Run
from pfungst.vectors import choose_layers, pool_channels, pool_maps

Progress = Callable[[str, int, int], None]
UNREADABLE = "unreadable: "  # how the reasons of pictures that cannot be read begin


@dataclass(frozen=True)
class Subject:
    """What an audit is about: model, data and settings, ready to use.

    mode     ``label`` or ``predicted``: whose score is explained
    only     index of the one class that is audited, or None for all
    layers   the layers whose channels are looked at
    classes  name of every output
    given    relevance maps made elsewhere, which take the place of the engine's; then there are no ``layers``
    """

    model: LoadedModel
    data: ImageData
    settings: Settings
    lrp: LRP
    preprocess: Preprocess
    mode: str
    only: int | None
    layers: tuple[str, ...]
    classes: tuple[str, ...]
    given: RelevanceFile | None = None
    source: Any = None  # model and images as they were given, to open the same elsewhere

    def load(self, rows: Any) -> Tensor:
        """Model inputs of these samples, on the device; they must have been readable before."""
        if len(rows) == 0:
            return torch.empty(0, *self.preprocess.shape, device=self.settings.device)
        inputs, _, skipped = load_batch(self.data, rows, self.preprocess, self.settings.workers)
        if skipped:
            row, reason = next(iter(skipped.items()))
            raise DataError(f"{self.data.ids[row]} could be read before and now cannot: {reason}", "restore the file")
        return inputs.to(self.settings.device)


def open_subject(model: str | nn.Module | LoadedModel, images: str | Path | ImageData, settings: Settings) -> Subject:
    """Load model and data, check that they fit, and settle preprocessing, target and layers."""
    source = (model, images)
    if not isinstance(model, LoadedModel):
        model = load_model(
            model,
            weights=settings.weights,
            device=settings.device,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            channels=settings.channels,
            classes=settings.classes,
        )
    try:
        data = images if isinstance(images, ImageData) else read_images(images, model.classes)
    except DataError:  # labels that are not among the classes: the fault may be in the list of classes
        _check_number(model, images, settings)
        raise
    return replace(prepare(model, limit_data(data, settings), settings), source=source)


def _check_number(model: LoadedModel, images: Any, settings: Settings) -> None:
    """Raises ModelError where the model has more or fewer outputs than class names, as far as that can be found out."""
    if model.classes is None or model.preprocess is None:
        return
    found: tuple[ImageData, int] | None = None
    with suppress(Exception):  # whatever fails here is told by the error that is already on its way
        data = read_images(images)
        with torch.no_grad():
            outputs = model.module(_first_readable(data, model.preprocess).to(settings.device)).shape[1]
        found = data, int(outputs)
    if found is not None:
        _class_names(model, *found, settings.classes)


def prepare(model: LoadedModel, data: ImageData, settings: Settings) -> Subject:
    """Try the model on the first readable picture and settle what follows from that; errors say what to mend."""
    preprocess = model.preprocess
    if preprocess is None:
        raise ModelError(
            "the model does not say how pictures are prepared",
            SIZE_REMEDY,
        )
    if preprocess.low is None or preprocess.high is None:
        preprocess = _measured(data, preprocess, settings)
    lrp = LRP(model.module, settings.preset, bounds=input_bounds(preprocess, settings.device))
    given = open_relevance(settings.relevance, data.ids) if settings.relevance else None
    first = _first_readable(data, preprocess).to(settings.device)
    layers: tuple[str, ...] = ()
    try:
        if given is None:
            trace = lrp.trace(first)
            output = trace.scores
            layers = choose_layers(trace.steps, settings.layers)
        else:
            output = ask_model(lrp, first)
    except PfungstError:
        raise
    except Exception as error:  # A user's own forward may raise anything.
        raise ModelError(
            f"the model cannot take an input of shape {tuple(first.shape)}: {_first_line(error)}",
            "check --size and --channels (L is one grey channel), and --mean/--std with one value a channel",
        ) from error
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            "the model returns NaN or infinity for the first picture",
            "check the weights, and that --mean and --std are those of its training",
        )
    classes = _class_names(model, data, output.shape[1], settings.classes)
    mode, only = choose_target(settings.target, data, classes)
    return Subject(model, data, settings, lrp, preprocess, mode, only, layers, classes, given)


def ask_model(lrp: LRP, inputs: Tensor) -> Tensor:
    """Scores (m, classes) of a model that is not explained."""
    with torch.no_grad():
        output = lrp.model(inputs)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ModelError(
            "the model does not return one row of scores a sample", "wrap the model so that it returns (n, classes)"
        )
    return output


def make_laboratory(subject: Subject) -> Laboratory:
    """The laboratory of an audit's model and data."""
    low, high = (end.flatten() for end in input_bounds(subject.preprocess, subject.settings.device))
    return Laboratory(subject.lrp, subject.load, low, high, subject.settings.batch_size, _given_pixels(subject))


def _given_pixels(subject: Subject) -> Callable[[Sequence[int]], Tensor] | None:
    """Rows -> pixel relevance (m, H, W) on the device, where it was made elsewhere."""
    given, size = subject.given, subject.preprocess.size
    if given is None:
        return None
    return lambda rows: given.read_pixels(np.asarray(rows), size).to(subject.settings.device)


def input_bounds(preprocess: Preprocess, device: str) -> tuple[Tensor, Tensor]:
    """Smallest and greatest value of the model's input, each (C, 1, 1)."""
    assert preprocess.low is not None
    assert preprocess.high is not None
    return preprocess.low[:, None, None].to(device), preprocess.high[:, None, None].to(device)


def _first_readable(data: ImageData, preprocess: Preprocess) -> Tensor:
    reasons = []
    for row in range(len(data)):
        inputs, ok, skipped = load_batch(data, [row], preprocess)
        if ok:
            return inputs
        reasons.append(f"{data.ids[row]}: {skipped[row]}")
    raise DataError(
        f"none of the {len(data)} pictures can be read, e.g. {reasons[0] if reasons else 'there is none'}",
        "check the folder, or convert the pictures to PNG or JPEG",
    )


def _measured(data: ImageData, preprocess: Preprocess, settings: Settings) -> Preprocess:
    """A custom preprocessing with the range of its values on the data, for noise and z^B."""
    rows = np.random.default_rng(settings.seed).permutation(len(data))[:64]
    inputs, ok, _ = load_batch(data, rows.tolist(), preprocess, settings.workers)
    if not ok:
        inputs = _first_readable(data, preprocess)
    return preprocess.measured(inputs.amin((0, 2, 3)), inputs.amax((0, 2, 3)))


def _class_names(model: LoadedModel, data: ImageData, outputs: int, file: Any = None) -> tuple[str, ...]:
    """A name for every output; ``file``: where the model's were given, for the error's sake."""
    names = model.classes or data.classes or tuple(str(i) for i in range(outputs))
    if file is not None and len(names) != outputs:
        given = f"{file} has" if isinstance(file, str | Path) else "the given classes have"
        plural = "s" if len(names) != 1 else ""
        raise ModelError(
            f"the model has {outputs} outputs, but {given} {len(names)} name{plural} ({shorten(names)})",
            f"give --classes FILE with {outputs} names, one a line, in the order of the outputs",
        )
    if len(names) > outputs:
        raise ModelError(
            f"there are {len(names)} classes ({shorten(names)}), but the model has {outputs} outputs",
            "give --classes FILE with the model's own class names, or remove folders that are no classes",
        )
    if len(names) < outputs:
        whose = "the data name" if model.classes is None else "the class names are of"
        raise ModelError(
            f"the model has {outputs} outputs, but {whose} {len(names)} classes: which is which is not known",
            "give --classes FILE with the model's class names, one a line, in the order of its outputs",
        )
    return names


def choose_target(target: str, data: ImageData, classes: tuple[str, ...]) -> tuple[str, int | None]:
    """``mode`` and ``only`` of a ``Subject``, for the setting ``target``.  Raises DataError where data have no such."""
    labelled = bool((data.labels >= 0).any())
    if target == "auto":
        return ("label" if labelled else "predicted"), None
    if target == "label" and not labelled:
        raise DataError(
            "the pictures have no labels", "use --target predicted, or one subfolder a class, or a manifest"
        )
    if target in ("label", "predicted"):
        return target, None
    if target not in classes:
        raise DataError(
            f"--target {target!r} is no class", f"it is label, predicted, or one of {', '.join(classes[:12])}"
        )
    return ("label" if labelled else "predicted"), classes.index(target)


def limit_data(data: ImageData, settings: Settings) -> ImageData:
    """At most ``settings.limit`` pictures, drawn evenly from the classes, in their order."""
    if settings.limit is None or settings.limit >= len(data):
        return data
    return data.select(spread_rows(data.labels, settings.limit, settings.seed))


@dataclass(frozen=True)
class Block:
    """What is kept of the samples ``rows``: all arrays (zeros where unreadable), why some were skipped, the cameras."""

    rows: np.ndarray
    arrays: dict[str, np.ndarray]
    skipped: dict[int, str]
    cameras: dict[int, str]


BlockMapper = Callable[[Subject, list[np.ndarray], Progress], Iterator[Block]]


def map_relevance(run: Run, subject: Subject, progress: Progress, mapper: BlockMapper | None = None) -> None:
    """Relevance of every picture, pooled, into ``pooled.zarr``; block by block, going on where it stopped."""
    count = len(subject.data)
    done = set(run.blocks_done())
    todo = [
        np.arange(block * BLOCK, min(count, (block + 1) * BLOCK))
        for block in range((count + BLOCK - 1) // BLOCK)
        if block not in done
    ]
    with ThreadPoolExecutor(1) as writer:  # a GPU need not wait for the disk; what was made is written, come what may
        coming: deque[Future[None]] = deque()
        for found in (mapper or map_blocks)(subject, todo, progress):
            coming.append(writer.submit(_write_block, run, subject, found))
            if len(coming) > 1:
                coming.popleft().result()
        while coming:
            coming.popleft().result()
    progress("relevance", count, count)


def _write_block(run: Run, subject: Subject, found: Block) -> None:
    block = int(found.rows[0]) // BLOCK
    run.create_arrays(len(subject.data), {name: (tuple(a.shape[1:]), str(a.dtype)) for name, a in found.arrays.items()})
    reasons = {subject.data.ids[row]: why for row, why in found.skipped.items()}
    run.write_json(f"skipped/{block:06d}.json", reasons)
    if found.cameras:
        run.write_json(f"cameras/{block:06d}.json", {str(row): name for row, name in found.cameras.items()})
    run.write_block(block, found.arrays)


def map_blocks(subject: Subject, todo: list[np.ndarray], progress: Progress) -> Iterator[Block]:
    """The blocks in their order, by this process."""
    settings, size = subject.settings, subject.settings.batch_size
    batches = [rows[i : i + size] for rows in todo for i in range(0, len(rows), size)]
    coming = read_ahead(subject.data, subject.preprocess, batches, settings.workers, settings.device)
    explained = _explain_ahead(subject, coming)
    for rows in todo:
        yield _map_block(subject, rows, explained, progress)


def _explain_ahead(subject: Subject, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch and what is to be kept of it (nothing of one that cannot be read), once the next is under way.

    So a GPU works on that while this one is fetched, and while a block is written.
    """
    waiting: tuple[Batch, dict[str, Tensor]] | None = None
    for batch in batches:
        found: dict[str, Tensor] = {}
        if batch.ok:
            pixels = _send(torch.from_numpy(batch.pixels), subject.settings.device)
            found = explain_batch(subject, subject.preprocess.to_inputs(pixels), np.asarray(batch.ok))
        if waiting is not None:
            yield waiting
        waiting = batch, found
    if waiting is not None:
        yield waiting


def _map_block(
    subject: Subject, rows: np.ndarray, explained: Iterator[tuple[Batch, dict[str, Tensor]]], progress: Progress
) -> Block:
    arrays: dict[str, np.ndarray] = {}
    skipped: dict[int, str] = {}
    cameras: dict[int, str] = {}
    done = 0
    while done < len(rows):
        batch, found = next(explained)
        skipped.update({row: f"{UNREADABLE}{why}" for row, why in batch.bad.items()})
        for name, values in _as_arrays(found, batch.files).items():
            if name not in arrays:
                arrays[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
            arrays[name][np.asarray(batch.ok) - rows[0]] = values
        if found:
            broken = [row for row, status in zip(batch.ok, found["status"].tolist(), strict=True) if status != READ]
            skipped.update(dict.fromkeys(broken, "the model returns NaN or infinity"))
            cameras.update({row: camera for row, (_, camera) in zip(batch.ok, batch.files, strict=True) if camera})
        done += len(batch.rows)
        progress("relevance", int(batch.rows[-1]) + 1, len(subject.data))
    if not arrays:  # nothing readable in this block: the arrays' shapes come from the layers
        one = explain_batch(subject, _first_readable(subject.data, subject.preprocess), rows[:1])
        empty = _as_arrays(one, [([0.0] * len(FILED), "")])
        arrays = {name: np.zeros((len(rows), *values.shape[1:]), values.dtype) for name, values in empty.items()}
    return Block(rows, arrays, skipped, cameras)


def explain_batch(subject: Subject, inputs: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
    """What is kept of a batch: predictions, the explained score, and relevance by place and by channel."""
    inputs = _send(inputs, subject.settings.device)
    trace: Trace | None = None
    try:
        if subject.given is None:
            trace = subject.lrp.trace(inputs, layers=subject.layers)
        output = ask_model(subject.lrp, inputs) if trace is None else trace.scores
    except PfungstError:
        raise
    except Exception as error:
        raise _model_error(error, subject, rows) from error
    finite = torch.isfinite(output).all(1)
    prediction = output.argmax(1)
    labels = _send(torch.from_numpy(subject.data.labels[rows]), subject.settings.device)
    target = prediction if subject.mode == "predicted" else torch.where(labels >= 0, labels, prediction)
    if trace is None:
        arrays = _given_arrays(subject, rows, output.gather(1, target[:, None])[:, 0])
    else:
        try:
            result = trace.relevance(target, last=True)
        except RuntimeError as error:
            if _out_of_memory(error):
                raise _model_error(error, subject, rows) from error
            raise
        arrays = _made_arrays(subject, result)
    arrays |= {
        "target": target,
        "prediction": prediction,
        "probability": output.softmax(1).amax(1),
        "target_probability": output.softmax(1).gather(1, target[:, None])[:, 0],
        "status": torch.where(finite, READ, NOT_READ),
        "properties": measure_pixels(subject.preprocess.to_pixels(inputs)),
    }
    return {name: values.detach() for name, values in arrays.items()}


def _made_arrays(subject: Subject, result: Relevance) -> dict[str, Tensor]:
    """What is kept of an explanation."""
    grid = subject.settings.grid
    arrays = {
        "where": pool_maps(result.scores, grid).reshape(-1, grid, grid),
        "explained": result.explained,
        "absorbed": result.absorbed,
    }
    if subject.settings.full_maps:
        arrays["relevance"] = result.scores.sum(1)
    for layer in subject.layers:
        arrays[f"what:{layer}"], arrays[f"strongest:{layer}"] = pool_channels(result.layers[layer])
    return arrays


def _given_arrays(subject: Subject, rows: np.ndarray, explained: Tensor) -> dict[str, Tensor]:
    """The same of maps made elsewhere; whatever they do not account for counts as absorbed."""
    assert subject.given is not None
    grid, device = subject.settings.grid, subject.settings.device
    maps = torch.from_numpy(subject.given.read(rows))
    arrays = {
        "where": pool_maps(maps[:, None], grid).reshape(-1, grid, grid).to(device),
        "explained": explained,
        "absorbed": explained.double() - maps.double().sum((1, 2)).to(device),
    }
    if subject.settings.full_maps:
        arrays["relevance"] = subject.given.read_pixels(rows, subject.preprocess.size).to(device)
    return arrays


def _send(values: Tensor, device: str) -> Tensor:
    """To the device, without waiting for what it is doing."""
    if values.is_cpu and device.startswith("cuda"):
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _as_arrays(found: dict[str, Tensor], files: list[tuple[list[float], str]]) -> dict[str, np.ndarray]:
    """As they are kept on disk; nothing of a batch that cannot be read."""
    wide = {"absorbed": np.float64, "target": np.int32, "prediction": np.int32, "status": np.uint8}
    arrays = {name: values.cpu().numpy().astype(wide.get(name, np.float32)) for name, values in found.items()}
    return {**arrays, "file": np.array([numbers for numbers, _ in files], np.float32)} if found else {}


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _model_error(error: Exception, subject: Subject, rows: np.ndarray) -> ModelError:
    settings = subject.settings
    if _out_of_memory(error):
        return ModelError(
            f"out of memory on {settings.device} with {settings.batch_size} pictures at once",
            "give a smaller --batch-size (and another --out)",
        )
    names = subject.data.ids[rows[0]] + (f" to {subject.data.ids[rows[-1]]}" if len(rows) > 1 else "")
    return ModelError(
        f"the model failed on the pictures {names}: {_first_line(error)}", "try it on these pictures without pfungst"
    )


def _first_line(error: Exception) -> str:
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return f"{kind}{error}".strip().splitlines()[0] if str(error).strip() else type(error).__name__
