"""All settings of an audit in one table: name, default, range, help.

The table makes the validation, the command line's flags with their help, and the record in the run folder.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pfungst.errors import SettingError
from pfungst.lrp.preset_files import describe_preset, is_preset_file, parse_preset, read_preset
from pfungst.lrp.presets import PRESETS, Preset


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    many: bool = False,
    free: bool = False,
    advanced: bool = False,
    files: bool = False,
) -> Any:
    """A row: ``free`` settings change how fast a run is, not what comes out; ``many`` takes several values.

    ``files``: a preset file may stand in place of one of the choices.
    """
    row = {"help": help, "low": low, "high": high, "choices": choices, "many": many, "free": free, "advanced": advanced}
    return dataclasses.field(default=default, metadata={**row, "files": files})


@dataclass(frozen=True)
class Settings:
    """What can be set for an audit.  Raises SettingError where a value is out of its range."""

    weights: str | None = _setting(None, "Weights of the model: .safetensors, or .pt/.pth with a state dict.")
    size: int | None = _setting(None, "Side of the model's input in pixels. [default: the model's own]", low=1)
    mean: tuple[float, ...] | None = _setting(
        None, "Mean of each channel, of pixels in 0..1 (or 0..255). [default: the model's own]", many=True
    )
    std: tuple[float, ...] | None = _setting(
        None, "Standard deviation of each channel. [default: the model's own]", many=True
    )
    channels: str | None = _setting(
        None, "Order of the input's channels. [default: the model's own]", choices=("RGB", "BGR", "L")
    )
    classes: str | None = _setting(
        None,
        "Text file with the model's class names, one a line, in the order of its outputs. [default: the model's own "
        "`classes`; else the names of the folders or labels, in alphabetical order]",
    )
    relevance: str | None = _setting(
        None,
        "Relevance maps made elsewhere, which are audited in place of pfungst's own: .npy, .npz, .h5, .zarr, .pt or "
        ".safetensors, one map a picture in sorted order, or with their names as 'ids'.",
    )
    preset: str | Preset = _setting(  # noqa: RUF009 - a Preset is frozen
        "auto",
        "Rules that share out relevance: a name, or a preset file as `pfungst tune` writes it, NAME.json.",
        choices=tuple(PRESETS),
        files=True,
    )
    target: str = _setting(
        "auto",
        "Whose score is explained: 'label' (the picture's own class), 'predicted', or one class by name, which alone "
        "is audited then. 'auto': label where there are labels, else predicted.",
    )
    batch_size: int = _setting(32, "Pictures asked at once.", low=1)
    device: str = _setting("cpu", "Where the model runs: cpu, cuda, cuda:1, ...")
    engine: str = _setting(
        "local",
        "Where relevance is computed: this process, or a Ray cluster (that of RAY_ADDRESS, else one is started on this "
        "machine), with the same result.",
        choices=("local", "ray"),
        free=True,
    )
    workers: int = _setting(
        min(16, os.cpu_count() or 2),
        "Threads (for a GPU: processes) that read pictures; processes that analyse classes, where there are many.",
        low=0,
        free=True,
    )
    seed: int = _setting(0, "Seed of everything random.", low=0)
    limit: int | None = _setting(None, "Use at most so many pictures, spread over the classes.", low=2)
    suspicion: float = _setting(
        0.1, "Least suspicion (0..1) for a group to be tested; groups in clean data rarely reach 0.4.", low=0, high=1
    )
    separate: float = _setting(
        0.4,
        "Least suspicion for a finding to be confirmed; below it, experiments that work leave it open.",
        low=0,
        high=1,
        advanced=True,
    )
    over_classes: bool = _setting(False, "Also look for groups over all classes together, in one analysis.")
    max_findings: int = _setting(12, "Test at most so many groups, the most suspicious ones.", low=1)
    min_size: int = _setting(8, "Least number of pictures in a group.", low=6, advanced=True)
    samples: int = _setting(
        48,
        "Pictures of each role in an intervention; up to four times as many where effects vary.",
        low=8,
        advanced=True,
    )
    min_share: float = _setting(
        0.1,
        "Least effect that counts, as a share of the way from other classes' scores to the group's.",
        low=0,
        high=1,
        advanced=True,
    )
    min_own: float = _setting(
        0.5,
        "Least part of a paste's effect, beyond that of any picture's paste, that ordinary members must lack.",
        low=0,
        high=1,
        advanced=True,
    )
    alpha: float = _setting(
        0.05, "Chance of a false confirmation in the run (Holm).", low=1e-4, high=0.5, advanced=True
    )
    grid: int = _setting(20, "Relevance maps are pooled to a grid of this side.", low=4, high=64, advanced=True)
    layers: int = _setting(4, "Layers whose channels are looked at.", low=1, high=16, advanced=True)
    null_draws: int = _setting(19, "Null draws for the number of clusters.", low=0, high=999, advanced=True)
    full_maps: bool = _setting(False, "Keep the whole relevance map of every picture, in relevance.zarr.")
    exemplars: int = _setting(6, "Example pictures a finding shows.", low=1, high=24, advanced=True)

    def __post_init__(self) -> None:
        # A file is read now, so that a run depends on what it says and not on its name, and never needs it again.
        given: Any = self.preset
        if isinstance(given, dict):  # from a run's record
            object.__setattr__(self, "preset", parse_preset(given, "setting preset"))
        elif is_preset_file(given):
            object.__setattr__(self, "preset", read_preset(given))
        for row in dataclasses.fields(self):
            _check(row, getattr(self, row.name))

    def record(self) -> dict[str, Any]:
        """What decides the result, for the run folder; free settings are left out."""
        values = {row.name: getattr(self, row.name) for row in dataclasses.fields(self) if not row.metadata["free"]}
        return {k: describe_preset(value) if isinstance(value, Preset) else value for k, value in values.items()}


def _check(row: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        if row.default is None:
            return
        raise SettingError(f"{row.name} is None", f"leave it out for the default {row.default!r}")
    meta = row.metadata
    if meta["files"] and isinstance(value, Preset):
        return
    if meta["choices"] and value not in meta["choices"]:
        more = ", or a preset file, NAME.json" if meta["files"] else ""
        raise SettingError(f"{row.name} is {value!r}", f"it is one of {', '.join(meta['choices'])}{more}")
    for end, wrong in (("low", lambda v, e: v < e), ("high", lambda v, e: v > e)):
        if meta[end] is None:
            continue
        whole = str(row.type).startswith("int")
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or math.isnan(value) or wrong(value, meta[end]):
            least = "" if meta["low"] is None else f"at least {meta['low']:g}"
            most = "" if meta["high"] is None else f"at most {meta['high']:g}"
            kind = "a whole number " if whole else ""
            ends = " and ".join(filter(None, (least, most)))
            raise SettingError(f"{row.name} is {value!r}", f"it must be {kind}{ends}")
