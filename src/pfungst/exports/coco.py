"""Findings as annotations in COCO's format: a category a finding, an annotation a member.

Boxes and masks are those of the original pictures, not of the model's input.  Only a region of fixed place has them;
of a cue that moves, or of a property of whole pictures, the box is the whole picture, and ``where`` says why.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pfungst.errors import RunError
from pfungst.exports.rows import Samples, measure_picture, new_file, put_on_picture, write_entries
from pfungst.judgements import last_answer
from pfungst.store import Run


def write_coco(samples: Samples, out: str | Path) -> None:
    """One JSON file with the members of the findings; names of files are relative to the folder of the pictures."""
    ids, paths = (samples.table.column(name).to_pylist() for name in ("id", "path"))
    members = [samples.members(record).tolist() for record in samples.findings]
    if samples.preprocess is None and any(record["where"]["kind"] == "fixed" for record in samples.findings):
        raise RunError(
            "the model prepares pictures by a function of its own, so where a region lies in them is not known",
            "export csv, parquet or spotlight, which need not know it",
        )
    sizes = {place: measure_picture(paths[place]) for place in sorted({place for own in members for place in own})}
    with new_file(out) as path, path.open("w", encoding="utf-8") as file:
        head = {"info": _describe_run(samples), "licenses": [], "categories": _categories(samples)}
        file.write(json.dumps(head, ensure_ascii=False)[:-1])
        images = (
            {"id": int(samples.rows[place]), "file_name": ids[place], "height": height, "width": width}
            for place, (height, width) in sizes.items()
        )
        _write_list(file, "images", images)
        _write_list(file, "annotations", _annotations(samples, members, sizes))
        file.write("}\n")


def _write_list(file: Any, name: str, entries: Any) -> None:
    """Add a list to an open JSON object, an entry a line."""
    file.write(f',\n"{name}": [')
    write_entries(file, entries)
    file.write("]")


def _describe_run(samples: Samples) -> dict[str, Any]:
    description = samples.description
    return {
        "description": f"findings of an audit by pfungst {description['versions']['pfungst']}",
        "model": description["model"]["name"],
        "model_digest": description["model"]["digest"],
        "data_digest": description["data"]["digest"],
    }


def _categories(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "name": record["id"],
            "supercategory": record["class"],
            "verdict": record["verdict"],
            "judgement": last_answer(record),
            "summary": record["summary"],
        }
        for number, record in enumerate(samples.findings, 1)
    ]


def _annotations(samples: Samples, members: list[list[int]], sizes: dict[int, tuple[int, int]]) -> Any:
    number = 0
    for category, (record, own) in enumerate(zip(samples.findings, members, strict=True), 1):
        draw = _drawer(samples, record)
        for place in own:
            number += 1
            image = int(samples.rows[place])
            yield {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, **draw(sizes[place])}


def _drawer(samples: Samples, record: dict[str, Any]) -> Any:
    """From a picture's (height, width) to the place of the finding in it; pictures of one size are drawn once."""
    kind = record["where"]["kind"]
    mask = read_mask(samples.run, record) if kind == "fixed" else None

    @lru_cache(maxsize=64)
    def draw(size: tuple[int, int]) -> dict[str, Any]:
        height, width = size
        drawn = None
        if mask is not None:
            assert samples.preprocess is not None
            drawn = put_on_picture(mask, samples.preprocess, size, size)
        if drawn is None or not drawn.any():  # a region in the padding round a picture lies outside of it
            where = kind if drawn is None else "outside the picture"
            return {"bbox": [0, 0, width, height], "area": height * width, "segmentation": [], "where": where}
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        return {
            "bbox": [int(value) for value in box],
            "area": int(drawn.sum()),
            "segmentation": {"size": [height, width], "counts": run_lengths(drawn)},
            "where": kind,
        }

    return draw


def read_mask(run: Run, record: dict[str, Any]) -> np.ndarray:
    """The region of a finding of fixed place in the model's input, (H, W) bool."""
    with Image.open(run.path / record["where"]["mask"]) as image:
        mask: np.ndarray = np.asarray(image.convert("L")) > 127
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask (H, W): column by column, zeros first."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
