"""A run as a project of ViRelAy 0.6: pictures, relevance maps, and an analysis a class, as HDF5 files and a YAML file.

The layout is the one that ViRelAy's reader opens, which its published specification does not describe in every point:

project.yaml      names the files below, relative to itself
label-map.json    [{index, word_net_id, name}], an entry a class
dataset.h5        data (n, 3, H, W) uint8, label (n,)
attribution.h5    attribution (n, 3, H, W) float32, prediction (n, classes), label (n,), rows as in the dataset
analysis.h5       CLASS/index (k,), CLASS/embedding/NAME (k, d) with attribute eigenvalue (d,), CLASS/cluster/NAME (k,)

Every class has the same embeddings and clusterings.  Nothing of ViRelAy is needed to write this, only h5py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pfungst.domains.decoding import UnreadableImage, open_image
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import DataError, RunError, need
from pfungst.exports.rows import Samples, new_folder
from pfungst.spectra import measure_spectrum
from pfungst.strategies import read_strategies
from pfungst.vectors import unit_rows

_METHOD = "spectral_analysis"  # a "-" in it would not be found by ViRelAy's server
_NOBODY = "no label"
_TINY = 1e-30  # ViRelAy divides by a map's greatest value


def write_virelay(samples: Samples, out: str | Path) -> None:
    """A folder whose ``project.yaml`` ViRelAy opens.

    Pictures are as the model sees them; maps are whole where the run kept them (``--full-maps``), else the pooled ones
    enlarged.  Classes are those of which the run has a map of samples.
    """
    h5py = need("h5py", "bridges", "the export to ViRelAy needs h5py")
    preprocess = samples.preprocess
    if preprocess is None:
        raise RunError(
            "the model prepares pictures by a function of its own, so what it sees of them is not known without it",
            "export csv, parquet or spotlight, which need not know it",
        )
    categories = list(_analyse(samples))
    if not categories:
        raise RunError(
            f"{samples.run.path} has no map of samples of any class that is exported, and ViRelAy opens no project "
            "without one",
            "audit more pictures a class (twice --min-size), or name other findings",
        )
    with new_folder(out) as folder:
        labels = _write_labels(samples, folder)
        with h5py.File(folder / "dataset.h5", "w") as file:
            _write_pictures(samples, preprocess, file)
            file["label"] = labels
            file["id"] = np.array([name.encode() for name in samples.table.column("id").to_pylist()], "S")
        with h5py.File(folder / "attribution.h5", "w") as file:
            _write_maps(samples, preprocess.size, file)
        with h5py.File(folder / "analysis.h5", "w") as file:
            for name, content in categories:
                _write_category(file.create_group(name), content)
        (folder / "project.yaml").write_text(_describe_project(samples, preprocess.size), encoding="utf-8")


def _category(index: int) -> str:
    """What stands for a class: names of classes may hold anything, "/" included."""
    return f"class{index:05d}"


def _write_labels(samples: Samples, folder: Path) -> np.ndarray:
    """``label-map.json``; the label of each sample (m,), and one more than the classes for who has none."""
    names = samples.description["data"]["classes"]
    index = {name: number for number, name in enumerate(names)}
    labels = np.array([index.get(name, len(names)) for name in samples.table.column("label").to_pylist()], np.int32)
    listed = [*names, _NOBODY] if (labels == len(names)).any() else names
    content = [{"index": number, "word_net_id": _category(number), "name": name} for number, name in enumerate(listed)]
    (folder / "label-map.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return labels


def _write_pictures(samples: Samples, preprocess: Preprocess, file: Any) -> None:
    """The pictures as the model sees them; black for those that it never saw."""
    shape = (3, *preprocess.size)
    data = file.create_dataset("data", (len(samples.rows), *shape), "uint8", chunks=(1, *shape))
    paths = samples.table.column("path").to_pylist()
    for place in np.flatnonzero(samples.read()):
        try:
            picture = preprocess.fit(
                open_image(Path(paths[place])).convert("L" if preprocess.channels == "L" else "RGB")
            )
        except (UnreadableImage, ValueError) as error:
            raise DataError(
                f"{paths[place]} cannot be read: {error}", "give --images with the folder of the pictures"
            ) from error
        data[place] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def _write_maps(samples: Samples, size: tuple[int, int], file: Any) -> None:
    """Relevance in the first of three channels, since ViRelAy shows the sum of channels, and takes no map of one."""
    count, shape = len(samples.rows), (3, *size)
    classes = len(samples.description["data"]["classes"])
    kept: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    attribution = file.create_dataset("attribution", (count, *shape), "float32", chunks=(1, *shape), **kept)
    prediction = file.create_dataset("prediction", (count, classes), "float32", chunks=(1, classes), **kept)
    file["label"] = samples.run.read_array("target", samples.rows)
    names = [samples.maps, "prediction", "probability", "target", "target_probability", "status"]
    for places, values in samples.run.stream_arrays(names, samples.rows):
        maps = np.nan_to_num(enlarge(values[samples.maps], size), nan=0.0, posinf=0.0, neginf=0.0)
        maps[~maps.any((1, 2)), 0, 0] = _TINY
        whole = np.zeros((len(places), *shape), np.float32)
        whole[:, 0] = maps
        scores = np.zeros((len(places), classes), np.float32)
        for which in ("target", "prediction"):
            told = values["target_probability" if which == "target" else "probability"]
            scores[np.arange(len(places)), values[which]] = np.where(values["status"] > 0, told, 0)
        first, last = int(places[0]), int(places[-1]) + 1  # rows are ascending, so a block's places follow each other
        attribution[first:last], prediction[first:last] = whole, scores


def enlarge(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (k, h, w) in another size, each value where it was, without a smooth between them."""
    rows, columns = (
        np.floor((np.arange(want) + 0.5) * have / want).astype(int)
        for want, have in zip(size, maps.shape[1:], strict=True)
    )
    result: np.ndarray = maps[:, rows[:, None], columns]
    return result


# ---- the analysis ----------------------------------------------------------------------------------------------------


def _analyse(samples: Samples) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each class that has a map of samples: its samples, their embeddings and clusterings.

    The eigenvectors are no part of a run folder; they are computed again as the audit did.
    """
    place = np.full(int(samples.run.shape("status")[0]), -1)
    place[samples.rows] = np.arange(len(samples.rows))
    number = np.zeros(len(samples.rows), np.int32)
    for record in reversed(samples.findings):  # of several findings of a sample the first one counts
        number[samples.members(record)] = int(record["id"].lstrip("f"))
    settings = samples.description["settings"]
    for entry in read_strategies(samples.run):
        if "x" not in entry:
            continue
        drawn = np.array([x is not None for x in entry["x"]], dtype=bool)
        rows = np.array(entry["rows"])[drawn]
        with threadpool_limits(1):
            vectors = unit_rows(samples.run.read_view("where", rows))
            spectrum = measure_spectrum(vectors, null_draws=0, seed=settings["seed"])
        kept = place[rows] >= 0
        if not kept.any():
            continue
        points = np.array([(x, y) for x, y in zip(entry["x"], entry["y"], strict=True) if x is not None])
        yield (
            _category(entry["class_index"]),
            {
                "index": place[rows][kept].astype(np.uint32),
                "embedding": {"tsne": points[kept], "spectral": spectrum.eigenvectors[kept]},
                "eigenvalues": spectrum.eigenvalues,
                "cluster": {
                    "findings": number[place[rows][kept]],
                    "spectral": np.array(entry["cluster"])[drawn][kept],
                },
            },
        )


def _write_category(group: Any, content: dict[str, Any]) -> None:
    group["index"] = content["index"]
    for name, values in content["embedding"].items():
        group[f"embedding/{name}"] = values.astype(np.float32)
    group["embedding/spectral"].attrs["eigenvalue"] = content["eigenvalues"].astype(np.float32)
    for name, values in content["cluster"].items():
        group[f"cluster/{name}"] = values.astype(np.int32)


def _describe_project(samples: Samples, size: tuple[int, int]) -> str:
    """``project.yaml``.  A text in JSON's quotes is one in YAML, too."""
    description = samples.description
    # ViRelAy finds projects by their names, so no two may have the same.
    digests = " ".join(description[of]["digest"][:8] for of in ("model", "data"))
    name = json.dumps(f"{samples.run.path.resolve().name} ({digests})", ensure_ascii=False)
    strategy = "true_label" if description["data"]["target"] == "label" else "predicted_label"
    return f"""project:
  name: {name}
  model: {json.dumps(description["model"]["name"], ensure_ascii=False)}
  label_map: label-map.json
  dataset:
    name: {json.dumps(description["data"]["root"], ensure_ascii=False)}
    type: hdf5
    path: dataset.h5
    input_width: {size[1]}
    input_height: {size[0]}
    up_sampling_method: none
    down_sampling_method: none
  attributions:
    attribution_method: {json.dumps(description["preset"].split(" ")[0], ensure_ascii=False)}
    attribution_strategy: {strategy}
    sources: [attribution.h5]
  analyses:
  - analysis_method: {_METHOD}
    sources: [analysis.h5]
"""
