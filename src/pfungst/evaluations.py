"""Methods judged by measures on a user's own model and pictures: ``evaluate`` -> ``Evaluation``.

Pictures come batch by batch; every method makes its maps once, every measure scores them, and what is finished of a
method, measure and batch lies in ``OUT/parts``, so that the same call goes on after a kill, and a longer list of
methods or measures computes what is new alone.  Controls (a random map, a Gaussian in the middle, the picture's edges)
are always in the table; a method that does not beat them is marked.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.errors import DataError, ModelError, PfungstError, RunError, SettingError, first_line
from pfungst.examples import Batch, Examples, Files, open_pictures
from pfungst.imports import open_relevance
from pfungst.lrp import Preset
from pfungst.maps import Subject
from pfungst.methods import CONTROLS, Method, check_maps, make_method, stored_method, wrap_method
from pfungst.models import LoadedModel
from pfungst.quality.measures import DEFAULT, Measure, choose_measures
from pfungst.quality.questions import MASKS, METHOD, Question, Scores
from pfungst.runs import reopen
from pfungst.sheets import write_evaluation, write_fragment
from pfungst.store import Run, list_differences, writing
from pfungst.tables import Scored, Table, tabulate, warn

METHODS = ("auto", "epsilon", "gradient", "gradient-x-input", "guided-backprop", "grad-cam", "integrated-gradients")
EXAMPLES = 6  # pictures whose maps are kept to be looked at
TARGETS = ("predicted", "label")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Part:
    """What one method and measure gave for one batch."""

    figures: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]
    shares: np.ndarray | None
    seconds: float  # for one map


class Evaluation(Scored):
    """What ``evaluate`` returns: the scores, and ways to look at them."""

    def table(self) -> Table:
        """Means with intervals, and which methods do not beat their controls."""
        return tabulate(self)

    def write(self, out: str | Path) -> Path:
        """Write evaluation.html (whose path is returned), evaluation.json, table.csv and pictures.csv into a folder."""
        return write_evaluation(self, out)

    def __repr__(self) -> str:
        left = "".join(f"\nleft out: {name}: {why}" for name, why in self.left_out.items())
        return f"Evaluation of {self.about['model']['name']} on {len(self.ids)} pictures\n{self.table()!r}{left}"

    def _repr_html_(self) -> str:
        return write_fragment(self)


def evaluate(
    model: str | Path | nn.Module | LoadedModel,
    images: Any = None,
    *,
    methods: Sequence[str | Path | Preset | Method] | Mapping[str, Any] | None = None,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    masks: str | Path | None = None,
    objects: Sequence[str] | None = None,
    relevance: Sequence[str | Path] = (),
    target: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    chunk: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
    bounds: tuple[Any, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **model_options: Any,
) -> Evaluation:
    """Judge ways to explain a model on pictures.

    model     as for an audit; or the folder of a finished run, which brings its pictures, preset and target, and its
              maps where it kept them (``--full-maps``, ``--relevance``)
    images    a folder, manifest or picture; tensors x, (x, labels) or (x, labels, masks); or a loader of such batches
    methods   names (``methods.METHODS``), presets, preset files or ``Method`` objects; or a mapping from names to
              functions of inputs and targets that give maps.  Controls are added
    measures  names (``quality.measures.MEASURES``), or a mapping from names to options, e.g. {"srg": {"fill": "blur"}};
              by default those that are cheap, and localisation where there are masks
    masks     a folder of masks, COCO, YOLO or VOC annotations of the pictures; ``objects``: only these categories
    relevance files of maps of these pictures that were made elsewhere (see ``imports.py``), judged beside the methods
    target    whose score is explained: ``predicted`` (default) or ``label``
    limit     at most so many pictures, drawn over the classes with ``seed``
    chunk     pictures the model is asked at once by flipping; by default what suits their size
    out       a folder for what is finished, so that the same call goes on; nothing is kept without it

    Raises SettingError, DataError, ModelError or RunError.  A method that fails for this model is left out, with the
    reason, in ``Evaluation.left_out``.
    """
    if target is not None and target not in TARGETS:
        raise SettingError(f"target is {target!r}", f"it is one of {', '.join(TARGETS)}")
    kept: list[Method] = []
    if images is None:
        subject, kept = _read_run(model, device)
        model, images, target = subject.model, subject.data, target or subject.mode
        if methods is None:
            methods = (subject.lrp.preset, *METHODS[1:])
    target = target or "predicted"
    loaded, examples = open_pictures(
        model, images, masks=masks, objects=objects, limit=limit, workers=workers, device=device, seed=seed,
        bounds=bounds, **model_options,
    )  # fmt: skip
    if relevance and not isinstance(examples, Files):
        raise SettingError("maps as files for pictures as tensors", "give methods={...}")
    options = dict(measures) if isinstance(measures, Mapping) else {}
    _check_options(options)
    if isinstance(measures, str):
        measures = [measures]
    names = DEFAULT + (("localisation",) if masks is not None else ()) if measures is None else tuple(measures)
    kept += [_open_maps(path, examples) for path in relevance]
    chosen = _choose_methods(METHODS if methods is None else methods, kept, loaded.module, examples, device)
    work = _Work(
        loaded, examples, chosen, choose_measures(names), options,
        target, batch_size, chunk, torch.device(device), None if out is None else Run(out),
        progress or (lambda stage, done, total: None),
    )  # fmt: skip
    return work.do({"target": target, "limit": limit, "seed": seed, "batch_size": batch_size})


def _read_run(path: Any, device: str) -> tuple[Subject, list[Method]]:
    """What a finished run was about, and the maps that it kept."""
    if not isinstance(path, str | Path) or not (Path(path) / "run.json").exists():
        raise SettingError("no images", "give a folder of images, tensors or a loader; or the folder of a finished run")
    subject, run = reopen(path, device=device).subject, Run(path)
    given, size, ids = subject.given, subject.preprocess.size, subject.data.ids
    if given is not None:
        return subject, [_stored("run", ids, lambda rows: given.read_pixels(rows, size))]
    if subject.settings.full_maps:
        return subject, [_stored("run", ids, lambda rows: torch.from_numpy(run.read_array("relevance", rows)))]
    return subject, []


def _open_maps(path: str | Path, examples: Examples) -> Method:
    assert isinstance(examples, Files)
    assert examples.data is not None
    assert examples.preprocess is not None
    given, size, ids = open_relevance(path, examples.data.ids), examples.preprocess.size, examples.data.ids
    file = Path(path).stat()
    token = f"{file.st_size} {file.st_mtime_ns}"
    return _stored(Path(path).stem, ids, lambda rows: given.read_pixels(rows, size), token)


def _stored(name: str, ids: Sequence[str], read: Callable[[np.ndarray], Tensor], token: str = "") -> Method:
    """Maps that lie in the order of these names, and are read by row."""
    place = {one: row for row, one in enumerate(ids)}
    return stored_method(name, lambda names: read(np.array([place[one] for one in names])), token)


def _check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    for measure in choose_measures(options) if options else ():
        known = list(inspect.signature(measure.score).parameters)[1:]
        unknown = [name for name in options[measure.name] if name not in known]
        if unknown:
            raise SettingError(f"{measure.name} has no option {unknown[0]!r}", f"it has {', '.join(known) or 'none'}")


def _choose_methods(given: Any, kept: list[Method], model: nn.Module, examples: Examples, device: str) -> list[Method]:
    bounds = (examples.low[None].to(device), examples.high[None].to(device))
    if isinstance(given, str | Preset | Method):
        given = [given]
    if isinstance(given, Mapping):
        chosen = [
            replace(make_method(one, model, bounds=bounds), name=name)
            if isinstance(one, str)
            else wrap_method(name, one)
            for name, one in given.items()
        ]
    else:
        chosen = [one if isinstance(one, Method) else make_method(one, model, bounds=bounds) for one in given]
    chosen += kept + [make_method(name, model) for name in CONTROLS]
    known: dict[str, Method] = {}
    for one in chosen:
        rules = _rules(known.setdefault(one.name, one))
        if rules and rules != _rules(one):
            raise SettingError(f"two presets are called {one.name!r}", "change the name in one of the files")
    return list(known.values())


def _rules(method: Method) -> str:
    """A preset's rules, and nothing for other methods."""
    explain: Any = method.explain
    return explain.lrp.preset.describe() if hasattr(explain, "lrp") else ""


@dataclass
class _Work:
    """The settings of one call."""

    loaded: LoadedModel
    examples: Examples
    methods: list[Method]
    measures: list[Measure]
    options: Mapping[str, Mapping[str, Any]]
    target: str
    batch_size: int
    chunk: int | None
    device: torch.device
    run: Run | None
    progress: Progress
    left_out: dict[str, str] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Part]] = field(default_factory=dict)
    maps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    seconds: float = 0.0  # that the last map took
    seen: int = 0  # pictures that are done

    def do(self, settings: Mapping[str, Any]) -> Evaluation:
        count = self.examples.count
        about = {
            "model": {"name": self.loaded.name, "digest": self.loaded.digest},
            "data": self.examples.digest,
            **settings,
        }
        self.begin(about)
        found = Evaluation(about={**about, "methods": [m.name for m in self.methods]})
        shown = set(np.linspace(0, (count or 1) - 1, min(EXAMPLES, count or 1)).round().astype(int).tolist())
        pictures: list[np.ndarray] = []
        batches = self.examples.batches(self.batch_size)
        for number, batch in enumerate(batches):
            if number == 0:
                found.chosen = self.tell_choices(batch.x.to(self.device))
            keep = [i for i, row in enumerate(batch.rows) if row in shown]
            self.judge(number, batch, keep)
            found.ids += batch.ids
            pictures += list(self.examples.pixels(batch.x[keep])) if keep else []
            found.shown += [batch.ids[i] for i in keep]
        if not found.ids:
            raise DataError("none of the pictures can be read", "check the folder")
        return self.collect(found, pictures)

    def tell_choices(self, x: Tensor) -> dict[str, str]:
        """Note what methods chose for themselves; the preset of those that choose one, by the method's name.

        Before anything is judged: from then on ``digest`` sees the preset that was chosen.
        """
        chosen = {}
        for method in self.methods:
            with suppress(PfungstError, RuntimeError):  # of which its maps will tell
                if method.about is not None:
                    self.examples.notes.append(method.about(x))
                if method.settle is not None:
                    chosen[method.name] = method.settle(x)
        return chosen

    def begin(self, about: Mapping[str, Any]) -> None:
        """Make sure that the folder's parts are of this model and these pictures."""
        if self.run is None:
            return
        with writing(self.run.path):
            self.run.path.mkdir(parents=True, exist_ok=True)
        known = self.run.read_json("parts/about.json")
        content = json.loads(json.dumps(about))
        if known is None:
            if any(not file.name.startswith(".") for file in self.run.path.iterdir()):
                raise RunError(f"{self.run.path} is not empty and no evaluation", "give --out another folder")
            self.run.write_json("parts/about.json", content)
        elif known != content:
            differences = "; ".join(list(list_differences(known, content))[:4])
            raise RunError(
                f"{self.run.path} belongs to another evaluation: {differences}",
                "give --out another folder, or the settings that this one began with",
            )

    def judge(self, number: int, batch: Batch, keep: list[int]) -> None:
        """All methods and measures on one batch."""
        x = batch.x.to(self.device)
        low, high = (end.to(self.device) for end in (self.examples.low, self.examples.high))
        unknown = torch.zeros(len(x), dtype=torch.long, device=self.device)
        base = Question(self.loaded.module, x, unknown, x[:, 0], low=low, high=high, chunk=self.chunk)
        target = self.choose_target(base, batch)
        masks = self.examples.masks(batch, target.cpu())
        total = len(self.methods) * max(self.examples.count or 0, self.seen + len(batch.ids))
        for place, method in enumerate(self.methods):
            self.progress("evaluating", len(self.methods) * self.seen + place * len(batch.ids), total)
            if method.name in self.left_out:
                continue
            question: Question | None = None
            for measure in self.measures:
                if f"{method.name}: {measure.name}" in self.left_out or measure.name in self.left_out:
                    continue
                name = f"parts/{_slug(method.name)}/{_slug(measure.name)}_{self.digest(method, measure)}_{number}.npz"
                part = self.read(name)
                try:
                    if part is None:
                        if question is None:
                            question = self.explain(method, base, batch.ids, target, masks, keep)
                        part = self.score(measure, question)
                        self.write(name, part)
                except _Refused as refused:
                    self.left_out[refused.name] = refused.reason
                    if refused.name == method.name:
                        break
                    continue
                self.parts.setdefault((method.name, measure.name), []).append(part)
            if method.name not in self.left_out and keep and question is None:
                with suppress(_Refused):  # its scores were there, its maps are to be looked at
                    self.explain(method, base, batch.ids, target, masks, keep)
        self.seen += len(batch.ids)
        self.progress("evaluating", len(self.methods) * self.seen, max(total, len(self.methods) * self.seen))

    def choose_target(self, base: Question, batch: Batch) -> Tensor:
        outputs = base.outputs
        if not bool(torch.isfinite(outputs).all()):
            raise ModelError("the model returns NaN or infinity", "check the weights, and --mean and --std")
        if self.target == "predicted":
            return outputs.argmax(1)
        if bool((batch.labels < 0).any()):
            raise DataError(
                f"{batch.ids[int((batch.labels < 0).nonzero()[0])]} has no label", "give --target predicted"
            )
        if int(batch.labels.max()) >= outputs.shape[1]:
            raise DataError(f"label {int(batch.labels.max())} of {outputs.shape[1]} outputs", "give --classes")
        return batch.labels.to(self.device)

    def explain(
        self, method: Method, base: Question, ids: Sequence[str], target: Tensor, masks: Tensor | None, keep: list[int]
    ) -> Question:
        """The method's maps as a question; they are timed, and those of the examples kept."""
        start = time.perf_counter()
        try:
            if method.stored is None:
                maps = method(base.x, target)
            else:
                maps = check_maps(method.stored(ids), base.x, method.name)
        except (PfungstError, RuntimeError, NotImplementedError) as error:
            raise _Refused(method.name, first_line(error)) from error
        except Exception as error:
            if method.kind != "own":  # a defect of ours is not to be hidden
                raise
            raise _Refused(method.name, f"{type(error).__name__}: {first_line(error)}") from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = (time.perf_counter() - start) / len(base.x)
        if keep:
            self.maps.setdefault(method.name, []).append(maps[keep].cpu().numpy())
        return base.about(maps, target=target, method=method, masks=None if masks is None else masks.to(self.device))

    def score(self, measure: Measure, question: Question) -> Part:
        if MASKS in measure.needs and question.masks is None:
            raise _Refused(measure.name, "needs masks: give --masks")
        assert question.method is not None
        alone = question.method.make is None and measure.name == "randomisation"
        if METHOD in measure.needs and (alone or question.method.stored is not None):
            raise _Refused(f"{question.method.name}: {measure.name}", "needs the method itself, not just maps")
        broken = ~torch.isfinite(question.maps).flatten(1).all(1)
        asked = question.about(question.maps.nan_to_num(0, 0, 0)) if bool(broken.any()) else question
        scores: Scores = measure(asked, **self.options.get(measure.name, {}))
        figures = {
            name: values.double().where(~broken, torch.nan).cpu().numpy() for name, values in scores.figures.items()
        }
        curves = {name: curve.float().cpu().numpy() for name, curve in scores.curves.items()}
        return Part(figures, curves, None if scores.shares is None else scores.shares.cpu().numpy(), self.seconds)

    def digest(self, method: Method, measure: Measure) -> str:
        """Of what decides a part beside the folder's identity: the options, and a preset's rules."""
        rules = _rules(method) or getattr(method.explain, "keywords", "")
        masks = self.examples.masks_digest if MASKS in measure.needs else ""
        text = json.dumps(
            [dict(self.options.get(measure.name, {})), rules, method.token, masks], default=str, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def read(self, name: str) -> Part | None:
        if self.run is None or not (self.run.path / name).exists():
            return None
        try:
            with np.load(self.run.path / name, allow_pickle=False) as file:
                content = {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # torn by a disk that lost power: done again
            return None
        figures = {key[2:]: value for key, value in content.items() if key.startswith("f/")}
        curves = {key[2:]: value for key, value in content.items() if key.startswith("c/")}
        return Part(figures, curves, content.get("shares"), float(content["seconds"]))

    def write(self, name: str, part: Part) -> None:
        if self.run is None:
            return
        arrays = {f"f/{key}": value for key, value in part.figures.items()}
        arrays |= {f"c/{key}": value for key, value in part.curves.items()}
        arrays["seconds"] = np.array(part.seconds)
        if part.shares is not None:
            arrays["shares"] = part.shares
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        (self.run.path / name).parent.mkdir(parents=True, exist_ok=True)
        self.run.write_bytes(name, file.getvalue())

    def collect(self, found: Evaluation, pictures: list[np.ndarray]) -> Evaluation:
        for method in self.methods:
            if method.name in self.left_out:
                continue
            found.kinds[method.name] = method.kind
            found.values[method.name], found.curves[method.name] = {}, {}
            for measure in self.measures:
                parts = self.parts.get((method.name, measure.name), [])
                if sum(len(next(iter(part.figures.values()))) for part in parts) != len(found.ids):
                    continue  # refused on the way
                for name in measure.figures:
                    found.values[method.name][name] = np.concatenate([part.figures[name] for part in parts])
                titles = parts[0].curves
                if titles and parts[0].shares is not None:
                    found.curves[method.name][measure.name] = {
                        title: np.concatenate([part.curves[title] for part in parts]) for title in titles
                    }
                    found.shares[measure.name] = parts[0].shares
                # The first batch warms up: it counts only if it is the only one.
                times = [part.seconds for part in parts]
                found.seconds[method.name] = float(np.mean(times[1:] or times))
            if sum(map(len, self.maps.get(method.name, ()))) == len(pictures) > 0:
                found.maps[method.name] = np.concatenate(self.maps[method.name])
        if not any(found.values.values()):
            why = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise SettingError(f"nothing could be measured: {why}", "give other --measures or --methods, or --masks")
        found.pictures = np.stack(pictures) if pictures else found.pictures
        found.left_out, found.measures = self.left_out, [m.name for m in self.measures if m.name not in self.left_out]
        skipped = [f"{name}: {why}" for name, why in list(self.examples.skipped.items())[:5]]
        more = f" and {len(self.examples.skipped) - 5} more" if len(self.examples.skipped) > 5 else ""
        self.examples.notes += warn(found)
        found.notes = [*self.examples.notes, *([f"not read: {'; '.join(skipped)}{more}"] if skipped else [])]
        return found


class _Refused(Exception):
    """A method, a measure, or one on the other, cannot be done here."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-." else "-" for char in name)[:80]
