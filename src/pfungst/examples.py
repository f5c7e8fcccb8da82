"""Pictures to judge maps on, batch by batch: from files, tensors or a loader, with labels and masks where known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.annotations import Annotations, fit_mask, read_annotations
from pfungst.domains.image import ImageData, Preprocess, complete_preprocess, load_batch, open_image, read_images
from pfungst.domains.labels import spread_rows
from pfungst.errors import DataError, ModelError, SettingError
from pfungst.lrp.streams import batches
from pfungst.models import LoadedModel, load_model
from pfungst.weights import digest_module

_MODEL_OPTIONS = {"weights", "size", "mean", "std", "channels", "classes"}


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pictures: names, inputs (n, C, H, W), labels (n,) (-1 where unknown), and what can draw them."""

    ids: tuple[str, ...]
    rows: tuple[int, ...]
    x: Tensor
    labels: Tensor


@dataclass(eq=False)
class Examples:
    """Pictures in batches.  ``low``, ``high``: ends of the input's range by channel, (C, 1, 1).

    ``count``: how many there are, None for a loader that does not say.  ``digest``: of what they are.
    """

    count: int | None
    low: Tensor
    high: Tensor
    digest: str
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def masks_digest(self) -> str:
        """Of where the objects are; "" without masks."""
        return ""

    def batches(self, size: int) -> Iterator[Batch]:
        """The pictures, ``size`` at once."""
        raise NotImplementedError

    def masks(self, batch: Batch, targets: Tensor) -> Tensor | None:
        """Where the objects of the target classes are, (n, H, W) bool, all False where unknown; None without masks."""
        return None

    def pixels(self, x: Tensor) -> np.ndarray:
        """The pictures (n, H, W, 3) in 0 to 1 for the eye."""
        low, high = self.low.to(x), self.high.to(x)
        shown = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        if shown.shape[1] != 3:
            shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return shown.permute(0, 2, 3, 1).float().cpu().numpy()


@dataclass(eq=False)
class Files(Examples):
    """Pictures on disk, with the model's preprocessing."""

    data: ImageData | None = None
    preprocess: Preprocess | None = None
    annotations: Annotations | None = None
    workers: int = 0

    @property
    def masks_digest(self) -> str:
        return "" if self.annotations is None else self.annotations.digest

    def batches(self, size: int) -> Iterator[Batch]:
        assert self.data is not None
        assert self.preprocess is not None
        for start in range(0, len(self.data), size):
            rows = list(range(start, min(start + size, len(self.data))))
            x, read, skipped = load_batch(self.data, rows, self.preprocess, self.workers)
            self.skipped.update({self.data.ids[row]: why for row, why in skipped.items()})
            if read:
                labels = torch.from_numpy(self.data.labels[read])
                yield Batch(tuple(self.data.ids[row] for row in read), tuple(read), x, labels)

    def masks(self, batch: Batch, targets: Tensor) -> Tensor | None:
        if self.annotations is None:
            return None
        assert self.data is not None
        assert self.preprocess is not None
        found = torch.zeros(len(batch.rows), *batch.x.shape[2:], dtype=torch.bool)
        for i, row in enumerate(batch.rows):
            target = int(targets[i])
            size = open_image(self.data.paths[row]).size
            name = self.classes[target] if target < len(self.classes) else ""
            mask = self.annotations.mask(row, (size[1], size[0]), name)
            if mask is not None:
                found[i] = fit_mask(mask, self.preprocess)
        return found

    def pixels(self, x: Tensor) -> np.ndarray:
        assert self.preprocess is not None
        return self.preprocess.to_pixels(x).permute(0, 2, 3, 1).cpu().numpy()


@dataclass(eq=False)
class Tensors(Examples):
    """Tensors, or any loader of x or (x, labels), with masks as a third where there are some."""

    loader: Iterable[Any] = ()
    given: dict[int, Tensor] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[Batch]:
        row = 0
        for x, labels in batches(self.loader, _split, None):
            labels, masks = labels
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                rows = tuple(range(row, row + len(x[part])))
                if masks is not None:
                    self.given = dict(zip(rows, masks[part].bool(), strict=True))
                known = torch.full((len(rows),), -1) if labels is None else labels[part].long()
                yield Batch(tuple(map(str, rows)), rows, x[part], known)
                row += len(rows)

    def masks(self, batch: Batch, targets: Tensor) -> Tensor | None:
        return torch.stack([self.given[row] for row in batch.rows]) if self.given else None


def _as_tensor(part: Any) -> Any:
    """Arrays, and labels in a list, as tensors; all else as it is."""
    if isinstance(part, np.ndarray):
        return torch.from_numpy(part)
    listed = isinstance(part, list | tuple) and len(part) > 0
    return torch.tensor(part) if listed and all(isinstance(one, int | np.integer) for one in part) else part


def _split(batch: Any) -> tuple[Any, Any]:
    """x, and (labels, masks) of a batch; the last two may be missing."""
    parts = list(batch) if isinstance(batch, list | tuple) else [batch]
    parts = [_as_tensor(part) for part in parts]
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], Tensor) or parts[0].dim() != 4:
        raise DataError(
            "a batch is not x, (x, labels) or (x, labels, masks)",
            "x is a tensor (n, channels, height, width), labels are indices in a tensor, an array or a list",
        )
    if not parts[0].is_floating_point():
        raise DataError(f"x holds {parts[0].dtype} values", "give floats, prepared as the model takes them")
    parts += [None] * (3 - len(parts))
    for name, part in (("labels", parts[1]), ("masks", parts[2])):
        if part is not None and len(part) != len(parts[0]):
            raise DataError(f"{len(parts[0])} pictures, {len(part)} {name}", f"give as many {name} as pictures")
    if parts[2] is not None:
        masks = parts[2][:, 0] if parts[2].dim() == 4 and parts[2].shape[1] == 1 else parts[2]
        if masks.shape != (len(parts[0]), *parts[0].shape[2:]):
            sizes = f"{tuple(parts[2].shape)} for pictures of {tuple(parts[0].shape)}"
            raise DataError(f"masks of shape {sizes}", "give (n, height, width)")
        parts[2] = masks
    return parts[0], (parts[1], parts[2])


def open_files(
    loaded: LoadedModel,
    images: str | Path | ImageData,
    *,
    masks: str | Path | None = None,
    objects: list[str] | None = None,
    limit: int | None = None,
    workers: int = 0,
    seed: int = 0,
) -> Files:
    """Pictures on disk; ``limit`` of them drawn over the classes; ``masks``: see ``annotations``.

    Raises DataError, or ModelError where the model does not say how pictures are prepared.
    """
    data = images if isinstance(images, ImageData) else read_images(images, loaded.classes)
    if limit is not None and limit < len(data):
        data = data.select(spread_rows(data.labels, limit, seed))
    preprocess = complete_preprocess(loaded.preprocess, data)
    if preprocess.low is None or preprocess.high is None:
        raise DataError("none of the first pictures can be read", "check the folder")
    classes = loaded.classes or data.classes
    notes, annotations = list(data.notes), None
    if masks is not None:
        annotations = read_annotations(masks, data).choose(classes, objects)
        notes += annotations.notes
    ends = preprocess.low[:, None, None], preprocess.high[:, None, None]
    return Files(len(data), *ends, data.digest(), tuple(classes), notes, {}, data, preprocess, annotations, workers)


def open_tensors(images: Any, *, bounds: tuple[Any, Any] | None = None, limit: int | None = None) -> Tensors:
    """Tensors x, (x, labels) or (x, labels, masks), or a loader of such batches.

    ``bounds``: (low, high) of the inputs, numbers or by channel; by default the extremes of the tensor, or of a
    loader's first batch, which a note says.
    """
    notes: list[str] = []
    images = getattr(images, "tensors", images)  # of a TensorDataset
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if isinstance(images, list) and images and all(isinstance(part, Tensor | np.ndarray) for part in images):
        images = tuple(images)
    if isinstance(images, tuple):
        images = tuple(map(_as_tensor, images))
    whole = isinstance(images, Tensor) or (
        isinstance(images, tuple) and all(isinstance(part, Tensor) or part is None for part in images)
    )
    if whole:
        parts = [images] if isinstance(images, Tensor) else list(images)
        parts = [part if part is None or limit is None else part[:limit] for part in parts]
        x, _ = _split(tuple(parts))
        loader: Iterable[Any] = [tuple(parts)]
        count: int | None = len(x)
    else:
        if limit is not None:
            raise SettingError("limit with a loader", "give a shorter loader, or tensors")
        loader = images
        first = next(iter(loader), None)
        if first is None:
            raise DataError("the loader is empty", "give at least one batch")
        if iter(loader) is loader:
            raise DataError("the loader is an iterator, which ends after one pass", "give a DataLoader or a list")
        x, _ = _split(first)
        dataset: Any = getattr(loader, "dataset", None)
        count = len(dataset) if hasattr(dataset, "__len__") else None
        if bounds is None:
            notes.append("the input's range is that of the loader's first batch: give bounds= to set it")
    low, high = (x.amin((0, 2, 3)), x.amax((0, 2, 3))) if bounds is None else bounds
    least, most = (torch.as_tensor(end).float().reshape(-1).expand(x.shape[1])[:, None, None] for end in (low, high))
    content = hashlib.sha256()
    for part in parts if whole else [x]:
        if part is not None:
            content.update(np.ascontiguousarray(part.detach().float().cpu().numpy()).tobytes())
    return Tensors(count, least, most, content.hexdigest(), (), notes, {}, loader)


def open_pictures(
    model: str | Path | nn.Module | LoadedModel,
    images: Any,
    *,
    masks: str | Path | None = None,
    objects: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
    bounds: tuple[Any, Any] | None = None,
    **model_options: Any,
) -> tuple[LoadedModel, Examples]:
    """The model and the pictures of a call such as ``evaluate``, whose arguments these are."""
    if unknown := set(model_options) - _MODEL_OPTIONS:
        raise SettingError(
            f"there is no argument {min(unknown)!r}", f"for the model: {', '.join(sorted(_MODEL_OPTIONS))}"
        )
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}", "it is at least 1")
    if isinstance(model, nn.Module) and not isinstance(images, str | Path | ImageData):
        if any(value is not None for value in model_options.values()):
            raise SettingError(f"{', '.join(model_options)} for tensors", "prepare the tensors as the model needs them")
        loaded = _wrap_module(model)
    else:
        spec = str(model) if isinstance(model, Path) else model
        loaded = spec if isinstance(spec, LoadedModel) else load_model(spec, device=device, **model_options)
    if isinstance(images, str | Path | ImageData):
        examples: Examples = open_files(
            loaded, images, masks=masks, objects=list(objects or ()), limit=limit, workers=workers, seed=seed
        )
    elif masks is not None:
        raise SettingError("masks as files for pictures as tensors", "give (x, labels, masks)")
    else:
        examples = open_tensors(images, bounds=bounds, limit=limit)
    return loaded, examples


def _wrap_module(module: nn.Module) -> LoadedModel:
    """A module that is asked with tensors, which need no preparation."""
    if module.training:
        raise ModelError("the model is in training mode", "call model.eval() first")
    return LoadedModel(module, type(module).__name__, None, None, digest_module(module))
