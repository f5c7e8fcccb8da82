"""A few pictures explained: heatmaps, overlays and a sheet as PNG, the numbers beside them as JSON.

One forward pass a batch serves all targets of its pictures.  Batches are read, explained and drawn one after another;
only with one scale for the whole set are all maps held until the last is known.
"""

from __future__ import annotations

import difflib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors
from torch import Tensor, nn

from pfungst import heatmaps
from pfungst.domains.image import MANIFESTS, ImageData, Preprocess, load_batch, read_images
from pfungst.errors import DataError, ModelError, PfungstError, RelevanceError, SettingError
from pfungst.lrp import LRP, Preset
from pfungst.models import LoadedModel, load_model
from pfungst.store import Run, writing

SAVE = ("none", "npy", "safetensors")
_TARGETS = "give predicted, top3, a class name or an index"
_LEAST_SIDE = 224  # heatmaps of smaller inputs are enlarged to at least this

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prediction:
    """One output of the model for one picture.

    ``logit``: the output as the model returns it.  ``probability``: its softmax, or the output itself where the model's
    outputs are probabilities already; None where the model has a single output.
    """

    index: int
    name: str
    logit: float
    probability: float | None


@dataclass(frozen=True)
class TargetMap:
    """The explanation of one output of one picture, and its files (in ``out``).

    ``total``: Σ relevance.  ``absorbed``: the share of the output that biases and stabilisers took, 1 - Σ/f; None where
    f = 0.  ``scale``: the |relevance| of a pixel, channels summed, from which on it has the end colour.
    ``relevance``: the file with the scores, float32 (C, H, W), channels in the order of the model's input.
    """

    prediction: Prediction
    total: float
    absorbed: float | None
    scale: float
    heatmap: str
    overlay: str
    relevance: str | None


@dataclass(frozen=True)
class Explanation:
    """One picture: its explained outputs, its greatest outputs, its sheet; or the reason why it was skipped."""

    path: Path
    targets: tuple[TargetMap, ...] = ()
    top: tuple[Prediction, ...] = ()
    sheet: str | None = None
    skipped: str = ""


@dataclass(frozen=True)
class _Mapped:
    """A picture between its relevance and its drawing; ``maps`` are (H, W), one a target, with their slugs."""

    name: str
    pixels: np.ndarray
    top: tuple[Prediction, ...]
    explained: tuple[Prediction, ...]
    slugs: tuple[str, ...]
    totals: tuple[float, ...]
    maps: tuple[np.ndarray, ...]
    saved: tuple[str | None, ...]


def explain(
    model: str | nn.Module | LoadedModel,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    targets: str | int | Sequence[str | int] = "predicted",
    topk: int = 5,
    preset: str | Preset = "auto",
    same_scale: bool = False,
    quantile: float = 0.995,
    save: str = "none",
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
    ``workers``: threads that read pictures.  ``progress(done, total)`` counts steps of the work.
    ``model_options``: as of ``load_model`` (weights, size, mean, std, channels, classes).

    Returns one Explanation a picture, in order; pictures that cannot be read are skipped and say why.
    Raises SettingError, ModelError, RelevanceError, DataError or RunError; what is finished by then stays.
    """
    _check(topk=topk, batch_size=batch_size, quantile=quantile, save=save)
    if isinstance(model, LoadedModel):
        if any(value is not None for value in model_options.values()):
            raise SettingError(f"{', '.join(model_options)} for a model that is loaded", "give them to load_model")
        loaded = model
    else:
        loaded = load_model(model, device=device, **model_options)
    data = _collect(images)
    preprocess = _complete(loaded, data)
    ends = [end[None, :, None, None].to(device) for end in (preprocess.low, preprocess.high) if end is not None]
    lrp = LRP(loaded.module, preset, bounds=(ends[0], ends[1]) if ends else None)
    work = _Work(
        loaded, preprocess, lrp, data, Run(out), _name_pictures(data.paths), targets, topk, save, quantile,
        batch_size, workers, torch.device(device), same_scale, progress,
    )  # fmt: skip
    with writing(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    return work.do()


@dataclass
class _Work:
    """The settings of one call, and what becomes known on the way: class names, file names in use, results."""

    loaded: LoadedModel
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
    steps: int = 0
    classes: tuple[str, ...] = ()
    wanted: list[tuple[str, int]] = field(default_factory=list)
    taken: set[str] = field(default_factory=lambda: {"explanations.json"})
    results: dict[int, Explanation] = field(default_factory=dict)

    def do(self) -> list[Explanation]:
        try:
            pictures: Iterable[tuple[int, _Mapped | str]] = self.map_pictures()
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
        return [self.results[row] for row in range(len(self.data))]

    def tick(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.steps += 1
            if self.progress is not None:
                self.progress(self.steps, len(self.data) * (2 if self.same_scale else 1))

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
            if not bool(torch.isfinite(values).all()):
                raise ModelError(
                    f"the model returns NaN or infinity for {self.data.ids[row]}",
                    "check the weights, and that --mean and --std are those of its training",
                )
        if not self.classes:
            self.classes = _class_names(self.loaded, output.shape[1])
            self.wanted = _read_targets(self.targets, self.classes)
        predictions = [_predictions(values, self.classes) for values in output]
        chosen = [_choose(self.wanted, values) for values in output]
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

    def keep(
        self, row: int, pixels: np.ndarray, predictions: list[Prediction], chosen: list[int], scores: list[np.ndarray]
    ) -> _Mapped:
        """Choose the file names, save the relevance if asked for, and keep what the drawing needs."""
        for index, values in zip(chosen, scores, strict=True):
            if not np.isfinite(values).all():
                raise RelevanceError(
                    f"the relevance of {self.classes[index]!r} in {self.data.ids[row]} is NaN or infinite",
                    "try another --preset; the weights may hold values that are not finite",
                )
        slugs = _slugs(chosen, self.classes)
        name = self.claim(self.names[row], slugs)
        saved: list[str | None] = [None] * len(slugs)
        if self.save == "npy":
            for k, values in enumerate(scores):
                saved[k] = f"{name}_{slugs[k]}_relevance.npy"
                buffer = io.BytesIO()
                np.save(buffer, values)
                self.run.write_bytes(f"{saved[k]}", buffer.getvalue())
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
            totals=tuple(float(values.sum(dtype=np.float64)) for values in scores),
            maps=tuple(heatmaps.pool_channels(values) for values in scores),
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
            targets.append(TargetMap(prediction, one.totals[k], absorbed, scale, files[0], files[1], one.saved[k]))
        clipped = any(float(np.abs(scores).max()) > scale for scores in one.maps)
        meaning = heatmaps.describe_scale(scale, self.quantile if clipped else 1, self.same_scale)
        shown = {prediction.index for prediction in one.explained}
        sheet = heatmaps.draw_sheet(
            _printable(path.name),
            one.pixels,
            overlays,
            [(prediction.name, _told(prediction)) for prediction in one.explained],
            [heatmaps.Bar(p.name, _told(p), p.probability, p.index in shown) for p in one.top],
            heatmaps.colorbar(scale, width=heatmaps.PANEL, clipped=clipped, font_size=14),
            [meaning, f"model {_printable(self.loaded.name)}, preset {self.lrp.preset.name}"],
        )
        heatmaps.save_png(sheet, self.run.path / f"{one.name}.png")
        return Explanation(path, tuple(targets), one.top, f"{one.name}.png")

    def record(self) -> None:
        """``explanations.json``: what was done so far, and with which settings."""
        content = {
            "version": 1,
            "model": _printable(self.loaded.name),
            "model_digest": self.loaded.digest,
            "preprocess": self.preprocess.describe(),
            "preset": self.lrp.preset.name,
            "same_scale": self.same_scale,
            "quantile": self.quantile,
            "images": [_as_json(self.results[row]) for row in sorted(self.results)],
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
    return ImageData(tuple(_printable(str(path)) for path in files), files, labels, (), None, Path())


def _complete(loaded: LoadedModel, data: ImageData) -> Preprocess:
    """The model's preprocessing; the range of a function's values is measured on the first pictures."""
    preprocess = loaded.preprocess
    if preprocess is None:
        raise ModelError("the model does not say how pictures are prepared", "give --size, --mean and --std")
    if preprocess.low is None:
        inputs, ok, _ = load_batch(data, range(min(len(data), 64)), preprocess)
        if ok:
            return preprocess.measured(inputs.amin((0, 2, 3)), inputs.amax((0, 2, 3)))
    return preprocess


def _class_names(loaded: LoadedModel, outputs: int) -> tuple[str, ...]:
    names = loaded.classes or ()
    if len(names) > outputs:
        surplus = "; the first is 'background', remove that line" if names[0].casefold() == "background" else ""
        raise ModelError(
            f"there are {len(names)} class names, but the model has {outputs} outputs{surplus}",
            "give --classes FILE with one name an output, in their order",
        )
    return (*names, *(f"output {index}" for index in range(len(names), outputs)))


def _read_targets(targets: Any, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """("top", k) for the k greatest outputs, ("class", index) for one of them."""
    parts = [targets] if isinstance(targets, (str, int)) else list(targets)
    wanted: list[tuple[str, int]] = []
    for part in parts:
        # Many class names have commas themselves ("tench, Tinca tinca"): the whole is tried before its parts.
        pieces = part.split(",") if isinstance(part, str) and not _matches(part, classes) else [part]
        wanted += [_read_target(one, classes) for one in pieces if str(one).strip()]
    if not wanted:
        raise SettingError("no targets", _TARGETS)
    return wanted


def _read_target(target: Any, classes: tuple[str, ...]) -> tuple[str, int]:
    text = str(target).strip()
    if isinstance(target, str) and (found := _matches(text, classes)):
        if len(found) > 1:
            fits = ", ".join(f"{index} ({classes[index]})" for index in found)
            raise SettingError(f"the target {text!r} fits several classes: {fits}", "give one of the indices")
        return "class", found[0]
    if text == "predicted":
        return "top", 1
    if text == "label":
        raise SettingError("loose pictures have no label", _TARGETS)
    if (top := re.fullmatch(r"top(\d+)", text)) and int(top[1]) > 0:
        return "top", min(int(top[1]), len(classes))
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < len(classes):
            raise SettingError(f"the target {text} is no output", f"the outputs are 0 to {len(classes) - 1}")
        return "class", int(text)
    words = {_words(part): part.strip() for name in classes for part in (*name.split(","), name)}
    close = ", ".join(words[key] for key in difflib.get_close_matches(_words(text), words, n=3))
    near = f"; close: {close}" if close else ""
    raise SettingError(f"the target {text!r} is none of the {len(classes)} classes{near}", _TARGETS)


def _matches(text: str, classes: tuple[str, ...]) -> list[int]:
    """Classes of that name; else those that list it among their synonyms, without regard to case."""
    exact = [index for index, name in enumerate(classes) if name == text.strip()]
    wanted = _words(text)
    return exact or [
        index for index, name in enumerate(classes) if wanted in {_words(name), *map(_words, name.split(","))}
    ]


def _choose(wanted: list[tuple[str, int]], output: Tensor) -> list[int]:
    """The outputs of one picture that are explained, each once."""
    order = output.argsort(descending=True, stable=True).tolist()
    chosen: list[int] = []
    for kind, value in wanted:
        chosen += order[:value] if kind == "top" else [value]
    return list(dict.fromkeys(chosen))


def _predictions(output: Tensor, classes: tuple[str, ...]) -> list[Prediction]:
    values = output.double()
    probabilities: list[float] | list[None] = [None]
    if len(values) > 1:
        # A model that ends in a softmax returns probabilities: a second softmax would flatten them.
        ready = bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-3
        probabilities = (values if ready else values.softmax(0)).tolist()
    return [Prediction(i, *row) for i, row in enumerate(zip(classes, values.tolist(), probabilities, strict=True))]


def _model_error(error: Exception, inputs: Tensor, batch_size: int) -> ModelError:
    if "out of memory" in str(error).lower():
        return ModelError(f"out of memory with {batch_size} pictures at once", "give a smaller --batch-size")
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"the model cannot take an input of shape {tuple(inputs.shape)}: {why}",
        "check --size and --channels (L is one grey channel), and --mean/--std with one value a channel",
    )


def _name_pictures(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: its stem, with as many of its folders as tell it from the others."""
    found: dict[int, str] = {}
    absolute = [path.absolute() for path in paths]
    waiting = list(range(len(paths)))
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = {i: _slug("_".join([*absolute[i].parts[-depth:-1], absolute[i].stem]), 120) for i in waiting}
        folded = [name.casefold() for name in names.values()]
        found |= {i: name for i, name in names.items() if folded.count(name.casefold()) == 1}
        waiting = [i for i in waiting if i not in found]
    # Left: cat.png beside cat.jpg, and what claim() then tells apart by numbers.
    return [found.get(i) or _slug(absolute[i].name.replace(".", "_"), 120) for i in range(len(paths))]


def _slugs(indices: Sequence[int], classes: tuple[str, ...]) -> tuple[str, ...]:
    """A file name for each class: its first synonym; with the indices where two are alike."""
    slugs = [_slug(classes[index].split(",")[0], 60) for index in indices]
    if len({slug.casefold() for slug in slugs}) < len(slugs):
        slugs = [f"{slug}_{index}" for slug, index in zip(slugs, indices, strict=True)]
    return tuple(slugs)


def _slug(text: str, most: int) -> str:
    """Letters, digits, dots and dashes of a text; at most ``most`` bytes, as file systems count."""
    kept = re.sub(r"[^\w.-]+", "_", _printable(text)).strip("._") or "_"
    return kept.encode()[:most].decode(errors="ignore")


def _words(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _told(one: Prediction) -> str:
    """An output in words: its probability and the value itself."""
    if one.probability is None:
        return f"output {one.logit:.3g}"
    percent = f"{one.probability:.1%}" if one.probability >= 0.001 else "under 0.1%"
    return f"{percent}, output {one.logit:.3g}"


def _as_json(one: Explanation) -> dict[str, Any]:
    path = {"path": _printable(str(one.path))}
    if one.skipped:
        return {**path, "skipped": one.skipped}
    targets = [asdict(target) for target in one.targets]
    flat = [{**target.pop("prediction"), **target} for target in targets]
    return {**path, "sheet": one.sheet, "targets": flat, "topk": [asdict(prediction) for prediction in one.top]}
