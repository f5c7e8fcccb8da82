"""Try it: a region of a picture cut, or pasted on another one, and what the run's model says to it at once.

A model is loaded only where the viewer was asked to (``pfungst view RUN --model``), at its first use, by a thread
of its own.  There is one model a run, so whatever asks it waits for its turn.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.responses import Response
from torch import Tensor

from pfungst.cuts import fill_blur, fill_colour, fill_harmonic, fill_noise, paste
from pfungst.errors import ModelError, PfungstError
from pfungst.heatmaps import encode_png
from pfungst.lrp import Relevance
from pfungst.maps import Subject, make_laboratory
from pfungst.regions import Laboratory, control_masks
from pfungst.runs import reopen
from pfungst.store import READ
from pfungst.viewer.calls import Call, Field, Refused
from pfungst.viewer.opened import OpenRun

CUTS: dict[str, Callable[[Laboratory, Tensor, Tensor], Tensor]] = {
    "cut:colour": lambda lab, inputs, masks: fill_colour(inputs, masks),
    "cut:noise": lambda lab, inputs, masks: fill_noise(inputs, masks, lab.low, lab.high, 0),
    "cut:blur": lambda lab, inputs, masks: fill_blur(inputs, masks),
    "cut:inpaint": lambda lab, inputs, masks: fill_harmonic(inputs, masks),
}
PASTE = "paste"
_TOLD = 5  # classes whose scores are told, besides the one that is explained
_PATIENCE = 30.0  # seconds that a try waits for its turn


@dataclass(frozen=True)
class Asked:
    """Which model the viewer may load: the run's own (``model`` None) or another one; see ``runs.reopen``."""

    model: str | None = None
    weights: str | None = None
    device: str | None = None


class Bench:
    """A run's model, and who may use it."""

    def __init__(self, opened: OpenRun, asked: Asked | None) -> None:
        self.opened, self.asked = opened, asked
        self._turn = threading.Lock()
        self._guard = threading.Lock()
        self._loader: threading.Thread | None = None
        self._subject: Subject | None = None
        self._failure = ""
        self._seconds = 0.0
        self._busy = ""

    def start(self) -> None:
        """Begin to load the model, if it may be loaded and nobody began."""
        if self.asked is None:
            raise Refused(409, "no model is loaded: start `pfungst view RUN --model`, or --model SPEC for another one")
        with self._guard:
            waiting = self._loader is not None and self._loader.is_alive()
            if self._subject is None and not waiting:
                self._failure = ""
                self._loader = threading.Thread(target=self._load, daemon=True)
                self._loader.start()

    def _load(self) -> None:
        assert self.asked is not None
        begun = time.perf_counter()
        try:
            self._subject = reopen(
                self.opened.run.path,
                model=self.asked.model,
                weights=self.asked.weights,
                images=self.opened.images,
                device=self.asked.device,
            ).subject
        except Exception as error:  # a model's own code may raise anything; the page tells it
            self._failure = str(error) if isinstance(error, PfungstError) else f"{type(error).__name__}: {error}"
        self._seconds = time.perf_counter() - begun

    def status(self) -> dict[str, Any]:
        """``state`` (off, asleep, loading, ready or failed), and of a model that is there what it is."""
        loading = self._loader is not None and self._loader.is_alive()
        subject = self._subject
        if subject is not None:
            same = subject.model.digest == self.opened.description["model"]["digest"]
            settings = subject.settings
            exact = same and self.opened.preprocess is not None  # the viewer's own pictures are what the model gets
            return {
                "state": "ready",
                "model": subject.model.name,
                "same": same,
                "exact": exact,
                "device": settings.device,
                "seconds": self._seconds,
                "size": list(subject.preprocess.size),
                "maps": subject.given is None,
                "classes": list(subject.classes),
                "busy": self._busy,
            }
        state = "off" if self.asked is None else "loading" if loading else "failed" if self._failure else "asleep"
        return {"state": state, "failure": self._failure, "busy": self._busy}

    @contextmanager
    def model(self, what: str, patience: float = _PATIENCE) -> Iterator[Subject]:
        """The model for oneself, loaded if it is not.  Raises Refused where it cannot be, or is in use for too long."""
        self.start()
        if self._loader is not None:
            self._loader.join()
        if self._subject is None:
            raise Refused(409, self._failure)
        if not self._turn.acquire(timeout=patience):
            raise Refused(409, f"the model is busy: {self._busy}")
        try:
            self._busy = what
            yield self._subject
        finally:
            self._busy = ""
            self._turn.release()


class Benches:
    """The models of all runs that are shown, and the calls to try something on them."""

    def __init__(self, find: Callable[[int], OpenRun], asked: Asked | None) -> None:
        self.find, self.asked = find, asked
        self._benches: dict[Path, Bench] = {}
        self._guard = threading.Lock()

    def bench(self, run: int) -> Bench:
        """The bench of a run, by number."""
        opened = self.find(run)
        with self._guard:
            return self._benches.setdefault(opened.run.path, Bench(opened, self.asked))

    def show_model(self, run: int) -> dict[str, Any]:
        """Whether there is a model."""
        return self.bench(run).status()

    def load_model(self, run: int) -> dict[str, Any]:
        """Begin to load it."""
        bench = self.bench(run)
        bench.start()
        return bench.status()

    def send_input(self, run: int, row: int) -> Response:
        """A sample as the model gets it, pixel by pixel."""
        bench = self.bench(run)
        bench.opened.check(row)
        with bench.model("a picture is read") as subject:
            content = _picture(subject, subject.load([row]))
        return Response(content, media_type="image/png")

    def list_others(self, run: int, row: int, count: int, seed: int, of: int) -> dict[str, Any]:
        """Samples to paste on: of other classes than this one's, by label and by decision, drawn by lot."""
        opened = self.find(run)
        opened.check(row)
        target, prediction = (opened.run.read_array(name) for name in ("target", "prediction"))
        own = target[row]
        foreign = (target != own) & (prediction != own) & (opened.run.read_array("status") == READ)
        if of >= 0:
            foreign &= target == of
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(foreign))[:count].tolist()
        names = opened.description["data"]["classes"]
        return {"class": names[own], "others": [{"row": one, "class": names[target[one]]} for one in rows]}

    def try_change(
        self, run: int, row: int, change: str, region: list[int], box: list[int], onto: int, target: int
    ) -> dict[str, Any]:
        """Change one picture and ask the model; see ``calls`` for what is asked."""
        bench = self.bench(run)
        for one in (row, *([onto] if change == PASTE else [])):
            bench.opened.check(one)
        with bench.model("a picture is changed") as subject:
            return _try(bench.opened, subject, row, change, (region, box), onto, target)

    def calls(self) -> list[Call]:
        """The table of calls.

        region  runs of pixels outside and inside by turns, row by row of the model's input, outside first
        box     or left, top, right, bottom in its pixels
        onto    with ``paste``: the sample that the region goes on
        target  the class whose score is explained; by default the one that the run explains the sample for
        """
        run = {"run": Field(int, low=0)}
        body = {
            "row": Field(int, low=0),
            "change": Field(str, choices=(*CUTS, PASTE)),
            "region": Field(list, [], high=200_000, items=int),
            "box": Field(list, [], high=4, items=int),
            "onto": Field(int, -1, low=-1),
            "target": Field(int, -1, low=-1),
        }
        here = "/api/runs/{run:int}"
        drawn = {"count": Field(int, 12, low=1, high=100), "seed": Field(int, 0, low=0), "of": Field(int, -1, low=-1)}
        return [
            Call("GET", here + "/model", "Whether there is a model to ask", self.show_model, run),
            Call("POST", here + "/model", "Begin to load the model", self.load_model, run),
            Call("GET", here + "/samples/{row:int}/input", "A sample as the model gets it", self.send_input,
                 {**run, "row": Field(int, low=0)}, returns="image/png"),
            Call("GET", here + "/samples/{row:int}/others", "Samples of other classes", self.list_others,
                 {**run, "row": Field(int, low=0)}, drawn),
            Call("POST", here + "/try", "Change a picture and ask the model", self.try_change, run, body=body),
        ]  # fmt: skip


def read_region(region: list[int], box: list[int], size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool that is meant.  Raises Refused where it is none, or marks no pixel."""
    height, width = size
    if bool(region) == bool(box):
        raise Refused(422, "give a region or a box")
    if any(one < 0 for one in (*region, *box)):
        raise Refused(422, "a region and a box have no negative numbers")
    mask = np.zeros(size, dtype=bool)
    if box:
        if len(box) != 4 or not (box[0] < box[2] <= width and box[1] < box[3] <= height):
            raise Refused(422, f"the box is to be left, top, right, bottom in a picture of {width} x {height}")
        mask[box[1] : box[3], box[0] : box[2]] = True
        return mask
    if sum(region) != height * width:
        raise Refused(422, f"the region has {sum(region)} pixels, the model's input has {height} x {width}")
    mask = np.repeat(np.arange(len(region)) % 2 == 1, region).reshape(size)
    if not mask.any():
        raise Refused(422, "the region is empty")
    return mask


def _try(
    opened: OpenRun,
    subject: Subject,
    row: int,
    change: str,
    region: tuple[list[int], list[int]],
    onto: int,
    target: int,
) -> dict[str, Any]:
    begun = time.perf_counter()
    mask = read_region(*region, subject.preprocess.size)
    if target >= len(subject.classes):
        raise Refused(422, f"there is no class {target}: the model has {len(subject.classes)}")
    rows = [row, onto] if change == PASTE else [row]
    if not (opened.run.read_array("status", np.array(rows)) == READ).all():
        raise Refused(422, "the model has not read this picture")
    chosen = _own_class(opened, subject, row) if target < 0 else target
    lab = make_laboratory(subject)
    masks = torch.from_numpy(mask)[None].to(subject.settings.device)
    own = subject.load([row])
    before = own if change != PASTE else subject.load([onto])
    after = paste(own, before, masks) if change == PASTE else CUTS[change](lab, before, masks)
    asked, maps = _ask(lab, torch.cat([before, after]), chosen, subject.given is None)
    control, ordinary = None, None
    if change == PASTE:  # the same region of a picture of the class that shares no finding with this one
        ordinary = draw_ordinary(opened, row)
        control = None if ordinary is None else paste(subject.load([ordinary]), before, masks)
    elif maps is not None:  # the same change of a region of the same size and shape where relevance is not
        control = CUTS[change](lab, before, control_masks(masks, maps[:1]))
    if control is not None:
        asked = torch.cat([asked, lab.ask(control)])
    return {
        "target": chosen,
        "scores": _tell_scores(asked, chosen, subject.classes),
        "decisions": [subject.classes[i] for i in asked.argmax(1).tolist()],
        "ordinary": ordinary,
        "area": float(mask.mean()),
        "size": list(subject.preprocess.size),
        **{
            key: None if inputs is None else _text(_picture(subject, inputs))
            for key, inputs in (("before", before), ("after", after), ("control", control))
        },
        "maps": None if maps is None else [_text(one.cpu().numpy().astype("<f4").tobytes()) for one in maps],
        "seconds": time.perf_counter() - begun,
    }


def draw_ordinary(opened: OpenRun, row: int) -> int | None:
    """Another picture that is explained as the same class and taken for it, of no finding that this one is in; by lot,
    but the same whenever it is asked for.  None where there is none."""
    target, prediction = (opened.run.read_array(name) for name in ("target", "prediction"))
    fits = (target == target[row]) & (prediction == target[row]) & (opened.run.read_array("status") == READ)
    fits[row] = False
    for members in opened.list_members():
        if row in members:
            fits[members] = False
    left = np.flatnonzero(fits)
    return int(np.random.default_rng(row).choice(left)) if len(left) else None


def _own_class(opened: OpenRun, subject: Subject, row: int) -> int:
    """The output that the run explains the sample for, by name: another model may have its classes in another order."""
    name = opened.description["data"]["classes"][int(opened.run.read_array("target", np.array([row]))[0])]
    if name not in subject.classes:
        raise Refused(422, f"the model that is asked has no class {name!r}: choose which one is explained")
    return subject.classes.index(name)


def _ask(lab: Laboratory, inputs: Tensor, target: int, explained: bool) -> tuple[Tensor, Tensor | None]:
    """Scores (m, classes) float64 and maps (m, H, W); no maps where those of the run were made elsewhere."""
    if not explained:
        return lab.ask(inputs), None
    try:
        result: Relevance = lab.lrp(inputs, target)
    except RuntimeError as error:  # out of memory, for one
        raise ModelError(f"the model failed on this picture: {error}", "try it without pfungst") from error
    output = result.output.detach().double()
    if not bool(torch.isfinite(output).all()):
        raise ModelError("the model returns NaN or infinity for the changed picture", "change another region")
    return output, result.scores.detach().sum(1)


def _tell_scores(asked: Tensor, target: int, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The classes that matter, before, after and in the control: the first of each, and the target; target first."""
    probability = asked.softmax(1)
    first = asked[:2].topk(min(_TOLD, asked.shape[1]), dim=1).indices
    wanted = dict.fromkeys([target, *first.T.flatten().tolist()])  # both first, then both second, ...
    return [
        {
            "class": classes[index],
            "class_index": index,
            "scores": asked[:, index].tolist(),
            "probabilities": probability[:, index].tolist(),
        }
        for index in list(wanted)[: _TOLD + 1]
    ]


def _picture(subject: Subject, inputs: Tensor) -> bytes:
    """The only input as a PNG file."""
    pixels = subject.preprocess.to_pixels(inputs.cpu()).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return encode_png((pixels * 255).round().astype(np.uint8))


def _text(content: bytes) -> str:
    """In base64, as JSON can hold it."""
    return base64.b64encode(content).decode()
