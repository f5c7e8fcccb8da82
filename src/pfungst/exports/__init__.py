"""A finished run in the formats of other tools.  Nothing is computed by the model; maps are never held all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pfungst.errors import SettingError
from pfungst.exports.coco import write_coco
from pfungst.exports.fiftyone import write_fiftyone
from pfungst.exports.rows import Samples, select_samples
from pfungst.exports.tables import write_csv, write_parquet, write_spotlight
from pfungst.exports.virelay import write_virelay
from pfungst.store import Run

FORMATS: dict[str, Callable[[Samples, str | Path], None]] = {
    "csv": write_csv,
    "parquet": write_parquet,
    "coco": write_coco,
    "fiftyone": write_fiftyone,
    "spotlight": write_spotlight,
    "virelay": write_virelay,
}


def export(
    run: Run, to: str, out: str | Path, *, findings: Sequence[str] = (), images: str | Path | None = None
) -> None:
    """Write a finished run for another tool.

    to        one of ``FORMATS``
    out       the file (csv, parquet, coco) or folder that is written; it must not exist, a folder may be empty
    findings  ids of findings, of which only the members are exported (their classes for ViRelAy, which shows groups
              among the others); all samples by default
    images    where the pictures are now, if they were moved

    Raises SettingError for another format or where ``out`` is taken, RunError where the run is not finished or has no
    such finding, DataError where pictures that the format needs are not there, MissingExtra where a library is.
    """
    if to not in FORMATS:
        raise SettingError(f"there is no format {to!r}", f"the formats are {', '.join(FORMATS)}")
    FORMATS[to](select_samples(run, findings, images, whole_classes=to == "virelay"), out)
