"""A run as a dataset of FiftyOne: its own format on disk, which ``fo.Dataset.from_dir`` opens.

metadata.json   the fields of samples, as FiftyOne 1.0 describes them; later versions bring it up to date on import
samples.json    one entry a sample: labels, tags, numbers, and its relevance as a heatmap

The pictures stay where they are.  Nothing of FiftyOne is needed to write this.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pfungst.domains.preprocessing import Preprocess
from pfungst.exports.rows import Samples, measure_picture, new_folder, put_on_picture, write_entries

_VERSION = "1.0.0"
_MOST = 256  # values along the longer side of a heatmap
_NUMBERS = ("probability", "score", "outlier", "x", "y")
_LABEL = (
    ("id", "ObjectId", "_id"),
    ("tags", "List", "tags"),
    ("label", "String", "label"),
    ("confidence", "Float", ""),
)
_HEATMAP = (*_LABEL[:2], ("map", "Array", ""), ("map_path", "String", ""), ("range", "HeatmapRange", ""))


def write_fiftyone(samples: Samples, out: str | Path) -> None:
    """A folder for ``fo.Dataset.from_dir(FOLDER, dataset_type=fo.types.FiftyOneDataset)``.

    Fields: ground_truth, prediction and explained (classifications), relevance (a heatmap over the whole picture, on a
    scale of its own that is symmetric about 0), findings (classifications with verdict and judgement as tags), cluster,
    score, probability, outlier, x, y, set_aside.  Tags of a sample: its findings, their verdicts and judgements.  Where
    the model prepares pictures by a function of its own there are no heatmaps: what it sees of a picture is not known.
    """
    seed = "".join(samples.description[of]["digest"] for of in ("model", "data"))
    with new_folder(out) as folder:
        content = json.dumps(_describe_dataset(samples, seed), indent=1, ensure_ascii=False)
        (folder / "metadata.json").write_text(content, encoding="utf-8")
        with (folder / "samples.json").open("w", encoding="utf-8") as file:
            file.write('{"samples": [')
            write_entries(file, _describe_samples(samples, seed))
            file.write("\n]}\n")


def _object_id(*parts: str) -> dict[str, str]:
    """MongoDB's identifier of a thing, the same whenever it is exported."""
    return {"$oid": hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]}


def _describe_samples(samples: Samples, seed: str) -> Iterator[dict[str, Any]]:
    readable = samples.read()
    for places, maps in samples.stream_maps():
        for place, row, values in zip(places, samples.table.take(places).to_pylist(), maps, strict=True):
            yield _describe_sample(samples, row, values if readable[place] else None, seed)


def _describe_sample(samples: Samples, row: dict[str, Any], values: np.ndarray | None, seed: str) -> dict[str, Any]:
    def label(kind: str, name: str, tags: list[str], **more: Any) -> dict[str, Any]:
        return {
            "_id": _object_id(seed, row["id"], kind, name),
            "_cls": "Classification",
            "tags": tags,
            "label": name,
        } | more

    told = list(zip(row["findings"], row["verdicts"], row["judgements"], strict=True))
    tags = list(dict.fromkeys(word for one in told for word in one if word))
    entry: dict[str, Any] = {
        "_id": _object_id(seed, row["id"]),
        "_media_type": "image",
        "_rand": int(_object_id(seed, row["id"])["$oid"][:12], 16) / 16**12,
        "filepath": str(Path(row["path"]).absolute()),
        "tags": tags,
        "metadata": None,
        "ground_truth": None if row["label"] is None else label("ground_truth", row["label"], []),
        "prediction": None,
        "explained": None if row["class"] is None else label("explained", row["class"], []),
        "relevance": None,
        "findings": None,
        "set_aside": row["set_aside"] or None,
        "cluster": row["cluster"],
        **{name: row[name] for name in _NUMBERS},
    }
    if row["prediction"] is not None:
        entry["prediction"] = label("prediction", row["prediction"], [], confidence=row["probability"])
    if told:
        own = [label("findings", name, [word for word in words if word]) for name, *words in told]
        entry["findings"] = {"_cls": "Classifications", "classifications": own}
    if values is not None and samples.preprocess is not None and np.isfinite(values).all():
        entry["relevance"] = _describe_heatmap(values, samples.preprocess, row, seed)
    return entry


def _describe_heatmap(values: np.ndarray, preprocess: Preprocess, row: dict[str, Any], seed: str) -> dict[str, Any]:
    drawn = lay_on_picture(values, preprocess, measure_picture(row["path"]))
    greatest = float(np.abs(drawn).max()) or 1.0
    buffer = io.BytesIO()
    np.save(buffer, drawn.astype(np.float32), allow_pickle=False)
    packed = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    return {
        "_id": _object_id(seed, row["id"], "relevance"),
        "_cls": "Heatmap",
        "tags": [],
        "map": {"$binary": {"base64": packed, "subType": "00"}},
        "range": [-greatest, greatest],
    }


def lay_on_picture(values: np.ndarray, preprocess: Preprocess, picture: tuple[int, int]) -> np.ndarray:
    """A map of the model's input, (h, w), as one of the whole picture (height, width), at about its own fineness."""
    top, left, bottom, right = preprocess.window(*picture)
    if (top, left, bottom, right) == (0, 0, *picture):
        return values
    cells = [2 * whole * have / (high - low) for whole, have, low, high in zip(
        picture, values.shape, (top, left), (bottom, right), strict=True
    )]  # fmt: skip
    shrink = min(1.0, _MOST / max(cells))
    return put_on_picture(values, preprocess, picture, tuple(max(1, round(cell * shrink)) for cell in cells))


# ---- metadata.json ---------------------------------------------------------------------------------------------------


def _describe_dataset(samples: Samples, seed: str) -> dict[str, Any]:
    description = samples.description
    name = f"pfungst-{description['model']['digest'][:8]}-{description['data']['digest'][:8]}"
    verdicts = {record["id"]: f"{record['verdict']}: {record['summary']}" for record in samples.findings}
    labels = (("ground_truth", "Classification"), ("prediction", "Classification"), ("explained", "Classification"))
    label = [_field(key, kind, column) for key, kind, column in _LABEL]
    return {
        "_id": _object_id(seed, "dataset"),
        "name": name,
        "slug": name,
        "version": _VERSION,
        "sample_collection_name": f"samples.{_object_id(seed, 'dataset')['$oid']}",
        "persistent": False,
        "media_type": "image",
        "group_media_types": {},
        "tags": [],
        "info": {"model": description["model"]["name"], "findings": verdicts},
        "app_config": {"grid_media_field": "filepath", "media_fields": ["filepath"], "modal_media_field": "filepath"},
        "classes": {},
        "default_classes": [],
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "sample_fields": [
            _field("id", "ObjectId", "_id"),
            _field("filepath", "String"),
            _field("tags", "List"),
            _document("metadata", "metadata.ImageMetadata", []),
            _field("created_at", "DateTime"),
            _field("last_modified_at", "DateTime"),
            _field("_media_type", "String"),
            _field("_rand", "Float"),
            _field("_dataset_id", "ObjectId"),
            *(_document(key, f"labels.{kind}", label) for key, kind in labels),
            _document("relevance", "labels.Heatmap", [_field(key, kind, column) for key, kind, column in _HEATMAP]),
            _document("findings", "labels.Classifications", [_classifications(label)]),
            _field("set_aside", "String"),
            _field("cluster", "Int"),
            *(_field(key, "Float") for key in _NUMBERS),
        ],
        "frame_fields": [],
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _field(name: str, kind: str, column: str = "") -> dict[str, Any]:
    module = "fiftyone.core.fields."
    return {
        "name": name,
        "ftype": f"{module}{kind}Field",
        "embedded_doc_type": None,
        "subfield": f"{module}StringField" if kind == "List" else None,
        "fields": [],
        "db_field": column or name,
        "description": None,
        "info": None,
        "read_only": kind == "DateTime",
    }


def _document(name: str, kind: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return _field(name, "EmbeddedDocument") | {"embedded_doc_type": f"fiftyone.core.{kind}", "fields": fields}


def _classifications(label: list[dict[str, Any]]) -> dict[str, Any]:
    """The list of labels inside the labels of a sample."""
    return _field("classifications", "List") | {
        "subfield": "fiftyone.core.fields.EmbeddedDocumentField",
        "embedded_doc_type": "fiftyone.core.labels.Classification",
        "fields": label,
    }
