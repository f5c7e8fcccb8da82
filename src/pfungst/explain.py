"""A few pictures explained: heatmaps, overlays and a sheet as PNG, the numbers beside them as JSON.

One forward pass a batch serves all targets of its pictures.  Batches are read, explained and drawn one after another;
only with one scale for the whole set are all maps held until the last is known.  Pictures larger than the model's input
are explained by sliding windows (``windows.py``), one after another.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors
from torch import Tensor, nn

from pfungst import heatmaps
from pfungst.domains.decoding import Conversions, list_conversions
from pfungst.domains.image import (
    MANIFESTS,
    ImageData,
    Preprocess,
    UnreadableImage,
    complete_preprocess,
    load_batch,
    read_images,
)
from pfungst.domains.large import Region, open_large
from pfungst.errors import DataError, ModelError, PfungstError, RelevanceError, SettingError, first_line
from pfungst.explanations import Explanation, TargetMap, describe_explanation
from pfungst.filenames import name_pictures, printable, slug_classes
from pfungst.journals import Journal
from pfungst.lrp import LRP, Preset
from pfungst.lrp import preset as named_preset
from pfungst.models import LoadedModel, load_model
from pfungst.predictions import (
    Prediction,
    choose_outputs,
    describe_outputs,
    name_classes,
    read_targets,
    tell_output,
)
from pfungst.pyramids import write_pyramid
from pfungst.store import Run, writing
from pfungst.windows import (
    Windows,
    make_windows,
    mean_output,
    shrink_maps,
    shrink_picture,
    slide,
    window_preprocess,
)

SAVE = ("none", "npy", "safetensors")
_LEAST_SIDE = 224  # heatmaps of smaller inputs are enlarged to at least this
JOURNALS = ".windows"  # what is done of large pictures, while the call lasts
_MOST_SIDE = 2048  # larger pictures are drawn at a whole fraction of their size

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Mapped:
    """A picture between its relevance and its drawing; ``maps`` are (H, W), one a target, with their slugs.

    ``detail``: a large picture and its maps (targets, H, W) in full, for pyramids.
    """

    name: str
    pixels: np.ndarray
    top: tuple[Prediction, ...]
    explained: tuple[Prediction, ...]
    slugs: tuple[str, ...]
    totals: tuple[float, ...]
    maps: tuple[np.ndarray, ...]
    saved: tuple[str | None, ...]
    windows: int = 0
    detail: tuple[Region, np.ndarray] | None = None


def explain(
    model: str | nn.Module | LoadedModel,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    targets: str | int | Sequence[str | int] = "predicted",
    topk: int = 5,
    preset: str | Path | Preset = "auto",
    same_scale: bool = False,
    quantile: float = 0.995,
    save: str = "none",
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    pyramid: str | Path | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    **model_options: Any,
) -> list[Explanation]:
    """Explain pictures and write, for each and each target, a heatmap and an overlay, and a sheet of all.

    Files in ``out``: ``NAME_TARGET_heatmap.png``, ``NAME_TARGET_overlay.png``, ``NAME.png`` (the sheet), with ``save``
    also ``NAME_TARGET_relevance.npy`` or ``NAME_relevance.safetensors`` (one tensor a target), and
    ``explanations.json``.  Files of the same names are replaced.  Pictures that share a name get longer ones.

    ``images``: files, folders or manifests; what is listed twice is explained once.
    ``targets``: ``predicted``, ``top3`` (any number), class names or indices; several as a list or with commas.
    ``topk``: how many of the greatest outputs are listed.
    ``same_scale``: one colour scale for all pictures (all maps are held in memory); otherwise one a picture, which its
    targets share.  ``quantile``: share of the pixels that lie within the scale; 1 = the scale is the greatest.
    ``window``: slide a window of this size (one side, or height and width, in pixels of the picture) over each picture,
    ``stride`` pixels further each time (half the window by default).  The model sees one window at a time, resized to
    its input where that has another size; a pixel's relevance is the mean over the windows that saw it, and outputs are
    means over windows.  Pictures of more than 2048 pixels a side are drawn at a whole fraction of their size.
    The same call goes on where it was killed.
    ``pyramid``: a folder for deep-zoom tiles (``.dzi``) of the picture and of each overlay at full size.
    ``workers``: threads that read pictures.  ``progress(done, total)`` counts steps of the work.
    ``preset``: a name, a preset file or a ``Preset``.
    ``model_options``: as of ``load_model`` (weights, size, mean, std, channels, classes).

    Returns one Explanation a picture, in order; pictures that cannot be read are skipped and say why.
    Raises SettingError, ModelError, RelevanceError, DataError or RunError; what is finished by then stays.
    """
    _check(topk=topk, batch_size=batch_size, quantile=quantile, save=save)
    preset = named_preset(preset)
    if isinstance(model, LoadedModel):
        if any(value is not None for value in model_options.values()):
            raise SettingError(f"{', '.join(model_options)} for a model that is loaded", "give them to load_model")
        loaded = model
    else:
        loaded = load_model(model, device=device, **model_options)
    if window is None and (stride is not None or pyramid is not None):
        raise SettingError("a stride or a pyramid without a window", "give --window, the side of what the model sees")
    windows = None if window is None else make_windows(window, stride)
    data = _collect(images)
    preprocess = complete_preprocess(loaded.preprocess, data)
    if windows is not None:
        preprocess = window_preprocess(preprocess)
    ends = [end[None, :, None, None].to(device) for end in (preprocess.low, preprocess.high) if end is not None]
    lrp = LRP(loaded.module, preset, bounds=(ends[0], ends[1]) if ends else None)
    work = _Work(
        loaded, preset, preprocess, lrp, data, Run(out), name_pictures(data.paths), targets, topk, save, quantile,
        batch_size, workers, torch.device(device), same_scale, progress, windows,
        None if pyramid is None else Path(pyramid),
    )  # fmt: skip
    with writing(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    return work.do()


@dataclass
class _Work:
    """The settings of one call, and what becomes known on the way: class names, file names in use, results."""

    loaded: LoadedModel
    preset: Preset
    preprocess: Preprocess
    lrp: LRP
    data: ImageData
    run: Run
    names: list[str]
    targets: Any
    topk: int
    save: str
    quantile: float
    batch_size: int
    workers: int
    device: torch.device
    same_scale: bool
    progress: Progress | None
    windows: Windows | None
    pyramid: Path | None
    steps: int = 0
    total: int = 0  # steps; an estimate while windows of pictures to come are not known
    classes: tuple[str, ...] = ()
    wanted: list[tuple[str, int]] = field(default_factory=list)
    taken: set[str] = field(default_factory=lambda: {"explanations.json"})
    results: dict[int, Explanation] = field(default_factory=dict)

    def do(self) -> list[Explanation]:
        try:
            self.total = len(self.data) * (2 if self.same_scale else 1)
            slid = ((row, self.map_large(row)) for row in range(len(self.data)))
            pictures: Iterable[tuple[int, _Mapped | str]] = slid if self.windows else self.map_pictures()
            scale = None
            if self.same_scale:
                pictures = list(self.tick(pictures))
                maps = (one for _, mapped in pictures if isinstance(mapped, _Mapped) for one in mapped.maps)
                scale = heatmaps.common_scale(maps, self.quantile)
            for row, mapped in self.tick(pictures):
                path, skip = self.data.paths[row], isinstance(mapped, str)
                self.results[row] = Explanation(path, skipped=mapped) if skip else self.draw(path, mapped, scale)
        except BaseException:
            with suppress(PfungstError):
                self.record()
            raise
        self.record()
        shutil.rmtree(self.run.path / JOURNALS, ignore_errors=True)
        return [self.results[row] for row in range(len(self.data))]

    def tick(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            if self.windows is None:
                self.tell(1)

    def tell(self, steps: int) -> None:
        self.steps += steps
        if self.progress is not None:
            self.progress(self.steps, self.total)

    def map_pictures(self) -> Iterator[tuple[int, _Mapped | str]]:
        """Every picture with its maps, or the reason why it was skipped."""
        for start in range(0, len(self.data), self.batch_size):
            rows = list(range(start, min(start + self.batch_size, len(self.data))))
            inputs, ok, skipped = load_batch(self.data, rows, self.preprocess, self.workers)
            done = dict(zip(ok, self.map_batch(inputs, ok), strict=True)) if ok else {}
            for row in rows:
                yield row, done[row] if row in done else skipped[row]

    def map_batch(self, inputs: Tensor, rows: list[int]) -> list[_Mapped]:
        try:
            trace = self.lrp.trace(inputs.to(self.device))
        except (RuntimeError, IndexError, ValueError) as error:
            raise _model_error(error, inputs, self.batch_size) from error
        output = trace.scores.detach().float().cpu()
        for row, values in zip(rows, output, strict=True):
            self.check_output(values, row)
        predictions = [describe_outputs(values, self.classes) for values in output]
        chosen = [choose_outputs(self.wanted, values) for values in output]
        rounds = max(len(one) for one in chosen)
        scores: list[list[np.ndarray]] = [[] for _ in rows]
        for k in range(rounds):
            # Pictures with fewer targets repeat their first one: the batch stays whole, the repetition is dropped.
            target = torch.tensor([one[k] if k < len(one) else one[0] for one in chosen])
            result = trace.relevance(target, last=k == rounds - 1).scores
            for i, one in enumerate(chosen):
                if k < len(one):
                    scores[i].append(result[i].detach().float().cpu().numpy())
        pixels = (self.preprocess.to_pixels(inputs).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        return [self.keep(row, pixels[i], predictions[i], chosen[i], scores[i]) for i, row in enumerate(rows)]

    def check_output(self, output: Tensor, row: int) -> None:
        """Raise where the outputs (outputs,) of a picture are not finite; the first say what can be asked for."""
        if not bool(torch.isfinite(output).all()):
            raise ModelError(
                f"the model returns NaN or infinity for {self.data.ids[row]}",
                "check the weights, and that --mean and --std are those of its training",
            )
        if not self.classes:
            self.classes = name_classes(self.loaded, len(output))
            self.wanted = read_targets(self.targets, self.classes)

    def map_large(self, row: int) -> _Mapped | str:
        """A picture with its maps by sliding windows, or the reason why it was skipped."""
        assert self.windows is not None
        try:
            picture = open_large(self.data.paths[row])
            count = self.windows.count(picture.size)
            if not count:
                height, width = self.windows.window
                return f"{picture.size[1]} x {picture.size[0]} pixels, smaller than the window of {width} x {height}"
            self.total = self.steps + 2 * count * (len(self.data) - row)
            journal = Journal(self.run.path / JOURNALS / self.names[row], self.identify(row))
            how: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "tell": self.tell}
            how["journal"] = journal
            output = mean_output(self.lrp.model, picture, self.preprocess, self.windows, **how)
            self.check_output(output, row)
            chosen = choose_outputs(self.wanted, output)
            slid = slide(self.lrp, picture, self.preprocess, self.windows, chosen, **how)
            factor = math.ceil(max(picture.size) / _MOST_SIDE)
            pixels = shrink_picture(picture, factor)
        except UnreadableImage as error:
            return str(error)
        except (RuntimeError, IndexError, ValueError) as error:
            raise _model_error(error, torch.empty(1, *self.preprocess.shape), self.batch_size) from error
        scores = [one[None] for one in slid.maps]
        maps = shrink_maps(slid.maps, factor)
        kept = self.keep(row, pixels, describe_outputs(output, self.classes), chosen, scores, maps, slid.totals)
        return replace(kept, windows=count, detail=(picture, slid.maps) if self.pyramid else None)

    def identify(self, row: int) -> dict[str, Any]:
        """What a picture's windows depend on, but for the targets."""
        assert self.windows is not None
        return {
            "model": self.loaded.digest,
            "preset": repr(self.preset),
            "preprocess": self.preprocess.digest(),
            "picture": self.data.select([row]).digest(),
            "windows": [*self.windows.window, *self.windows.stride],
            "batch": [self.batch_size, str(self.device), torch.__version__],
        }

    def keep(
        self,
        row: int,
        pixels: np.ndarray,
        predictions: list[Prediction],
        chosen: list[int],
        scores: list[np.ndarray],
        maps: Iterable[np.ndarray] | None = None,
        totals: Sequence[float] | None = None,
    ) -> _Mapped:
        """Choose the file names, save the relevance if asked for, and keep what the drawing needs."""
        if totals is None:
            totals = [float(values.sum(dtype=np.float64)) for values in scores]
        for index, total in zip(chosen, totals, strict=True):
            if not math.isfinite(total):
                raise RelevanceError(
                    f"the relevance of {self.classes[index]!r} in {self.data.ids[row]} is NaN or infinite",
                    "try another --preset; the weights may hold values that are not finite",
                )
        slugs = slug_classes(chosen, self.classes)
        name = self.claim(self.names[row], slugs)
        saved: list[str | None] = [None] * len(slugs)
        if self.save == "npy":
            for k, values in enumerate(scores):
                saved[k] = f"{name}_{slugs[k]}_relevance.npy"
                self.run.write_array(f"{saved[k]}", values)
        elif self.save == "safetensors":
            saved = [f"{name}_relevance.safetensors"] * len(slugs)
            tensors = {slug: np.ascontiguousarray(values) for slug, values in zip(slugs, scores, strict=True)}
            self.run.write_bytes(f"{saved[0]}", to_safetensors(tensors))
        return _Mapped(
            name=name,
            pixels=pixels,
            top=tuple(sorted(predictions, key=lambda one: -one.logit)[: self.topk]),
            explained=tuple(predictions[index] for index in chosen),
            slugs=slugs,
            totals=tuple(totals),
            maps=tuple(map(heatmaps.pool_channels, scores) if maps is None else maps),
            saved=tuple(saved),
        )

    def claim(self, name: str, slugs: Sequence[str]) -> str:
        """The name, or one with a number, under which no file of another picture is replaced."""
        kinds = ("heatmap.png", "overlay.png", "relevance.npy")
        ends = [".png", "_relevance.safetensors", *(f"_{slug}_{kind}" for slug in slugs for kind in kinds)]
        for number in itertools.count(1):
            candidate = name if number == 1 else f"{name}_{number}"
            files = {f"{candidate}{end}".casefold() for end in ends}
            if not files & self.taken:
                break
        self.taken |= files
        return candidate

    def draw(self, path: Path, one: _Mapped, scale: float | None) -> Explanation:
        if scale is None:
            scale = heatmaps.common_scale(one.maps, self.quantile)
        picture = one.pixels / 255
        factor = max(1, math.ceil(_LEAST_SIDE / max(picture.shape[:2])))
        overlays, targets = [], []
        for k, (prediction, scores) in enumerate(zip(one.explained, one.maps, strict=True)):
            files = [f"{one.name}_{one.slugs[k]}_{kind}.png" for kind in ("heatmap", "overlay")]
            overlays.append(heatmaps.overlay(picture, scores, scale))
            for file, pixels in zip(files, (heatmaps.color(scores, scale), overlays[-1]), strict=True):
                heatmaps.save_png(heatmaps.enlarge(pixels, factor), self.run.path / file)
            absorbed = 1 - one.totals[k] / prediction.logit if prediction.logit else None
            tiles = self.draw_tiles(one, k, scale)
            targets.append(
                TargetMap(prediction, one.totals[k], absorbed, scale, files[0], files[1], one.saved[k], tiles)
            )
        clipped = any(float(np.abs(scores).max()) > scale for scores in one.maps)
        meaning = heatmaps.describe_scale(scale, self.quantile if clipped else 1, self.same_scale)
        notes = [meaning, f"model {printable(self.loaded.name)}, preset {self.lrp.preset.name}"]
        if self.windows:
            (height, width), (down, right) = self.windows.window, self.windows.stride
            notes.append(f"mean over {one.windows} windows of {width} x {height} pixels, every {right} x {down}")
        found = Conversions() if self.windows else list_conversions(path)  # windows are read by ``large.py``
        notes += [*found.told, *([found.tell_dark()] if found.dark else [])]
        shown = {prediction.index for prediction in one.explained}
        sheet = heatmaps.draw_sheet(
            printable(path.name),
            one.pixels,
            overlays,
            [(prediction.name, tell_output(prediction)) for prediction in one.explained],
            [heatmaps.Bar(p.name, tell_output(p), p.probability, p.index in shown) for p in one.top],
            heatmaps.colorbar(scale, width=heatmaps.PANEL, clipped=clipped, font_size=14),
            notes,
        )
        heatmaps.save_png(sheet, self.run.path / f"{one.name}.png")
        whole = self.draw_tiles(one, None, scale)
        return Explanation(path, tuple(targets), one.top, f"{one.name}.png", windows=one.windows, pyramid=whole)

    def draw_tiles(self, one: _Mapped, target: int | None, scale: float) -> str | None:
        """The pyramid of the picture, or of one target's overlay; None where none is asked for."""
        if one.detail is None or self.pyramid is None:
            return None
        picture, maps = one.detail
        if target is None:
            return write_pyramid(self.pyramid, one.name, picture.size, picture.read, form="jpeg").name

        def read(top: int, left: int, height: int, width: int) -> np.ndarray:
            pixels = np.asarray(picture.read(top, left, height, width)) / 255
            return heatmaps.overlay(pixels, maps[target, top : top + height, left : left + width], scale)

        return write_pyramid(self.pyramid, f"{one.name}_{one.slugs[target]}_overlay", picture.size, read).name

    def record(self) -> None:
        """``explanations.json``: what was done so far, and with which settings."""
        content = {
            "version": 1,
            "model": printable(self.loaded.name),
            "model_digest": self.loaded.digest,
            "preprocess": self.preprocess.describe(),
            "preset": self.lrp.preset.name,
            "same_scale": self.same_scale,
            "quantile": self.quantile,
            **({"window": self.windows.window, "stride": self.windows.stride} if self.windows else {}),
            "images": [describe_explanation(self.results[row]) for row in sorted(self.results)],
        }
        self.run.write_json("explanations.json", content)


def _check(*, topk: int, batch_size: int, quantile: float, save: str) -> None:
    for name, value in (("topk", topk), ("batch_size", batch_size)):
        if value < 1:
            raise SettingError(f"{name} is {value!r}", "it must be at least 1")
    if not 0 < quantile <= 1:
        raise SettingError(f"quantile is {quantile!r}", "it is above 0 and at most 1")
    if save not in SAVE:
        raise SettingError(f"save is {save!r}", f"it is one of {', '.join(SAVE)}")


def _collect(images: Sequence[str | Path]) -> ImageData:
    """All pictures of the files, folders and manifests, each file once, in the order given."""
    if isinstance(images, (str, Path)):
        images = [images]
    paths: dict[Path, Path] = {}
    for given in (Path(one).expanduser() for one in images):
        listed = given.is_dir() or (given.suffix.lower() in MANIFESTS and given.exists())
        for path in read_images(given).paths if listed else (given,):
            paths.setdefault(path.absolute(), path)
    if not paths:
        raise DataError("there are no pictures", "give one image file or more, or a folder of them")
    files = tuple(paths.values())
    labels = np.full(len(files), -1, dtype=np.int64)
    return ImageData(tuple(printable(str(path)) for path in files), files, labels, (), None, Path())


def _model_error(error: Exception, inputs: Tensor, batch_size: int) -> ModelError:
    if "out of memory" in str(error).lower():
        return ModelError(f"out of memory with {batch_size} pictures at once", "give a smaller --batch-size")
    why = first_line(error)
    return ModelError(
        f"the model cannot take an input of shape {tuple(inputs.shape)}: {why}",
        "check --size and --channels (L is one grey channel), and --mean/--std with one value a channel",
    )
