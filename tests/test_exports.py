"""A run in the formats of other tools, each read back by somebody else's reader."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Console, Small
from PIL import Image

import pfungst
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import DataError, MissingExtra, RunError, SettingError
from pfungst.exports import FORMATS, export
from pfungst.exports.coco import run_lengths
from pfungst.exports.fiftyone import lay_on_picture
from pfungst.exports.rows import measure_picture, new_folder, put_on_picture
from pfungst.exports.virelay import enlarge
from pfungst.imports import open_relevance
from pfungst.judgements import write_judgement
from pfungst.store import Run

PLAIN = ("csv", "parquet", "coco", "fiftyone", "spotlight")  # these need no library of their own


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with a judgement."""
    run = Run(shutil.copytree(finished, tmp_path_factory.mktemp("exports") / "run"))
    write_judgement(run, "f001", "unsure", by="a")
    write_judgement(run, "f001", "cheat", by="b")
    return run


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in every format that needs no library of its own."""
    folder = tmp_path_factory.mktemp("out")
    for name in PLAIN:
        export(run, name, folder / name)
    return folder


@pytest.fixture(scope="module")
def project(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("virelay") / "project"
    export(run, "virelay", folder)
    return folder


def findings(run: Run) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = run.read_json("findings.json")["findings"]
    return records


def test_csv(folder: Path, run: Run) -> None:
    with (folder / "csv").open(newline="", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    kept = {row["id"]: row for row in pq.read_table(run.path / "samples.parquet").to_pylist()}
    assert list(rows) == list(kept)
    for name, row in rows.items():
        assert [row[key] for key in ("path", "label", "prediction", "set_aside")] == [
            kept[name][key] for key in ("path", "label", "prediction", "set_aside")
        ]
        assert float(row["score"]) == pytest.approx(kept[name]["score"], rel=1e-6)
        own = [record for record in findings(run) if name in record["samples"]]
        assert row["findings"] == ";".join(record["id"] for record in own)
        assert row["verdicts"] == ";".join(record["verdict"] for record in own)
        assert row["judgements"] == ";".join("cheat" if record["id"] == "f001" else "" for record in own)


def test_parquet_has_lists(folder: Path, run: Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(folder / "parquet").set_index("id")
    for record in findings(run):
        members = frame.index[[record["id"] in own for own in frame["findings"]]]
        assert list(members) == record["samples"]
    assert list(frame.loc["rose/00.png", "judgements"]) == ["cheat"]
    assert list(frame.loc["leaf/00.png", "findings"]) == []


def test_coco(folder: Path, run: Run) -> None:
    content = json.loads((folder / "coco").read_text("utf-8"))
    images = {image["id"]: image for image in content["images"]}
    for category, record in zip(content["categories"], findings(run), strict=True):
        assert (category["name"], category["supercategory"]) == (record["id"], record["class"])
        own = [one for one in content["annotations"] if one["category_id"] == category["id"]]
        assert [images[one["image_id"]]["file_name"] for one in own] == record["samples"]
        for one in own:
            assert one["where"] == record["where"]["kind"]
            if record["where"]["kind"] != "fixed":
                assert (one["bbox"], one["segmentation"]) == ([0, 0, 24, 24], [])
                continue
            # Pictures and inputs are of one size here.
            left, top, right, bottom = record["where"]["box"]
            assert one["bbox"] == [left, top, right - left, bottom - top]
            mask = np.asarray(Image.open(run.path / record["where"]["mask"])) > 127
            assert np.array_equal(decode(one["segmentation"]), mask)
            assert one["area"] == mask.sum()
    assert {record["where"]["kind"] for record in findings(run)} >= {"fixed"}
    assert len({one["id"] for one in content["annotations"]}) == len(content["annotations"])
    assert sorted(images) == sorted({one["image_id"] for one in content["annotations"]})


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """COCO's run lengths -> mask, by the format's own words: column by column, zeros first."""
    height, width = segmentation["size"]
    flat = [i % 2 == 1 for i, length in enumerate(segmentation["counts"]) for _ in range(length)]
    assert len(flat) == height * width
    return np.array([[flat[x * height + y] for x in range(width)] for y in range(height)])


def test_coco_opens_in_pycocotools(folder: Path, run: Run) -> None:
    tool = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools")
    opened = tool.COCO(str(folder / "coco"))
    (first,) = opened.loadAnns(opened.getAnnIds(catIds=[1])[:1])
    assert opened.annToMask(first).sum() == first["area"]


@pytest.mark.parametrize("corner", [False, True])
def test_run_lengths(corner: bool) -> None:
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    mask[0, 0] = corner
    assert np.array_equal(decode({"size": [5, 7], "counts": run_lengths(mask)}), mask)


def test_spotlight(folder: Path, run: Run) -> None:
    table = pq.read_table(folder / "spotlight" / "samples.parquet")
    ids = table.column("id").to_pylist()
    vectors = np.array(table.column("relevance").to_pylist())
    where = run.read_array("where").reshape(len(ids), -1)
    assert np.allclose(vectors, where / np.linalg.norm(where, axis=1, keepdims=True), atol=1e-6)
    issues = json.loads((folder / "spotlight" / "issues.json").read_text("utf-8"))
    for issue, record in zip(issues, findings(run), strict=True):
        assert [ids[row] for row in issue["rows"]] == record["samples"]
        assert set(issue) == {"title", "rows", "severity", "columns", "description"}  # DataIssue takes no others
        assert issue["severity"] in ("low", "medium", "high")
        assert set(issue["columns"]) <= set(table.column_names)
    assert issues[0]["description"].endswith("Judged: cheat.")
    compile((folder / "spotlight" / "show.py").read_text(), "show.py", "exec")


def test_the_same_run_gives_the_same_bytes(folder: Path, project: Path, run: Run, tmp_path: Path) -> None:
    for name in FORMATS:
        export(run, name, tmp_path / name)
    for path in (project / name for name in ("dataset.h5", "attribution.h5", "analysis.h5", "project.yaml")):
        assert path.read_bytes() == (tmp_path / "virelay" / path.name).read_bytes(), path
    shutil.rmtree(tmp_path / "virelay")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path


def test_only_some_findings(run: Run, tmp_path: Path, console: Console) -> None:
    code, output, error = console("export", run.path, "--to", "csv", "--out", tmp_path / "a.csv", "--findings", "f001")
    assert (code, error) == (0, "")
    assert str(tmp_path / "a.csv") in output
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == findings(run)[0]["samples"]
    pfungst.reopen(run.path).export("coco", tmp_path / "a.json", findings=["f001"])
    assert [one["name"] for one in json.loads((tmp_path / "a.json").read_text())["categories"]] == ["f001"]


def test_refusals(run: Run, tmp_path: Path, console: Console) -> None:
    with pytest.raises(SettingError, match=r"there is no format 'xls'\n  Remedy: the formats are csv"):
        export(run, "xls", tmp_path / "a")
    with pytest.raises(RunError, match="has no finding 'f009'"):
        export(run, "csv", tmp_path / "a", findings=["f009"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    for name in FORMATS:
        code, _, error = console("export", run.path, "--to", name, "--out", tmp_path / "taken")
        assert code == 1
        assert "Remedy: give --out" in error
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match=r"00.png cannot be read.*\n  Remedy: give --images"):
        export(run, "coco", tmp_path / "a", images=tmp_path / "nowhere")
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    description = other.describe()
    del description["stages"]["samples"]
    other.write_json("run.json", description)
    with pytest.raises(RunError, match="is not finished"):
        export(other, "csv", tmp_path / "a")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "a"))]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("of an export that was killed")

    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            assert not list(folder.iterdir())
            (folder / "a").write_text("a")
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert not list(tmp_path.iterdir())


def test_fiftyone(folder: Path, run: Run) -> None:
    described = json.loads((folder / "fiftyone" / "metadata.json").read_text("utf-8"))
    entries = json.loads((folder / "fiftyone" / "samples.json").read_text("utf-8"))["samples"]
    assert set(entries[0]) <= {field["db_field"] for field in described["sample_fields"]}
    kept = pq.read_table(run.path / "samples.parquet").to_pylist()
    assert len({entry["_id"]["$oid"] for entry in entries}) == len(kept)
    for row, (entry, known) in enumerate(zip(entries, kept, strict=True)):
        assert entry["filepath"] == known["path"]
        assert entry["ground_truth"]["label"] == known["label"]
        assert entry["prediction"]["confidence"] == known["probability"]
        own = [record["id"] for record in findings(run) if known["id"] in record["samples"]]
        assert [one["label"] for one in (entry["findings"] or {"classifications": []})["classifications"]] == own
        packed = base64.b64decode(entry["relevance"]["map"]["$binary"]["base64"])
        where = np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False)
        assert np.array_equal(where, run.read_array("where")[row])  # the pictures are of the size of the input
        assert entry["relevance"]["range"] == [-np.abs(where).max(), np.abs(where).max()]
    assert entries[40]["tags"] == ["f001", "confirmed", "cheat"]


def test_a_heatmap_lies_where_the_input_was_cut_from() -> None:
    """A map of the middle of a wide picture, of a 20 x 20 input resized to 24 and cut to 20."""
    values = np.arange(400, dtype=np.float32).reshape(20, 20) + 1
    drawn = lay_on_picture(values, Preprocess((20, 20), resize=24), (240, 480))
    assert drawn.shape == (48, 96)  # two a cell: 240 pixels are 24, 480 are 48
    assert np.array_equal(drawn[4:44, 28:68], values.repeat(2, 0).repeat(2, 1))
    assert drawn.sum() == 4 * values.sum()
    assert max(lay_on_picture(np.ones((300, 300)), Preprocess((300, 300), resize=330), (600, 900)).shape) == 256


@pytest.mark.parametrize("picture", [(40, 24), (24, 40), (7, 7), (24, 24)])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((12, 12), resize=16),
        Preprocess((12, 12), resize=12),
        Preprocess((12, 16), crop="squash"),
        Preprocess((12, 12), crop="pad"),
        Preprocess((20, 20)),
    ],
)
def test_maps_lie_on_pictures_as_inputs_are_cut_from_them(picture: tuple[int, int], preprocess: Preprocess) -> None:
    """The oracle is the preprocessing itself: a picture of its own coordinates, seen through it."""
    height, width = picture
    y, x = np.mgrid[:height, :width]
    fields = []
    for coordinate in (y, x):
        whole = Image.fromarray((coordinate + 1).astype(np.uint8) * 4).convert("RGB")  # 0 where there is no picture
        nearest = Preprocess(**{**vars(preprocess), "interpolation": "nearest", "mean": (0.0,) * 3})
        fields.append(np.asarray(nearest.fit(whole))[:, :, 0])
    seen = [put_on_picture(field.astype(float), preprocess, picture, picture) for field in fields]
    inside = seen[0] > 0
    assert inside[height // 2, width // 2]
    step = max(1.0, height / preprocess.size[0], width / preprocess.size[1])  # pixels that one pixel of an input covers
    assert np.abs(seen[0] / 4 - 1 - y)[inside].max() <= step
    assert np.abs(seen[1] / 4 - 1 - x)[inside].max() <= step


def test_a_picture_lying_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert measure_picture(tmp_path / "a.jpg") == (30, 20)
    picture.save(tmp_path / "b.jpg")
    assert measure_picture(tmp_path / "b.jpg") == (20, 30)


# ---- ViRelAy ---------------------------------------------------------------------------------------------------------


def test_virelay_files(project: Path, run: Run) -> None:
    import h5py

    labels = json.loads((project / "label-map.json").read_text("utf-8"))
    assert labels == [
        {"index": 0, "word_net_id": "class00000", "name": "leaf"},
        {"index": 1, "word_net_id": "class00001", "name": "rose"},
    ]
    kept = pq.read_table(run.path / "samples.parquet").to_pydict()
    with h5py.File(project / "dataset.h5") as file:
        assert file["data"].dtype == np.uint8
        for row in (0, 79):
            picture = np.asarray(Image.open(kept["path"][row])).transpose(2, 0, 1)
            assert np.array_equal(file["data"][row], picture)
        assert file["label"][:].tolist() == [0] * 40 + [1] * 40
        assert [name.decode() for name in file["id"]] == kept["id"]
    with h5py.File(project / "attribution.h5") as file:
        where = run.read_array("where")
        relevance = file["attribution"][:].sum(1)
        rows = (np.arange(24) + 0.5) * 20 // 24
        assert np.array_equal(relevance, where[:, rows.astype(int)][:, :, rows.astype(int)])
        assert file["label"][:].tolist() == run.read_array("target").tolist()
        assert file["prediction"][:].argmax(1).tolist() == run.read_array("prediction").tolist()
        assert np.allclose(file["prediction"][:].max(1), kept["probability"])
    with h5py.File(project / "analysis.h5") as file:
        assert sorted(file) == ["class00000", "class00001"]
        for number, category in enumerate(file.values()):
            entry = run.read_json(f"classes/{number:04d}.json")
            assert category["index"][:].tolist() == entry["rows"]
            assert category["cluster/spectral"][:].tolist() == entry["cluster"]
            told = [kept["finding"][row] for row in entry["rows"]]
            assert category["cluster/findings"][:].tolist() == [0 if one is None else int(one[1:]) for one in told]
            points = category["embedding/tsne"][:]
            assert np.allclose(points, np.column_stack([kept["x"], kept["y"]])[entry["rows"]])
            assert np.allclose(category["embedding/spectral"].attrs["eigenvalue"], entry["eigenvalues"], atol=1e-6)
            assert category["embedding/spectral"].shape == (len(entry["rows"]), len(entry["eigenvalues"]))


def test_what_virelay_gets_can_be_audited_again(project: Path, run: Run) -> None:
    ids = pq.read_table(run.path / "samples.parquet").column("id").to_pylist()
    maps = open_relevance(project / "attribution.h5", ids).read(np.array([3, 79]))
    assert np.array_equal(maps, enlarge(run.read_array("where", np.array([3, 79])), (24, 24)))


def test_a_model_with_a_function_of_its_own(run: Run, tmp_path: Path) -> None:
    """What it sees of a picture is not known, so nothing says where."""
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    description = other.describe()
    description["model"]["preprocess"] = {"custom": {"name": "f"}, "shape": [3, 24, 24]}
    other.write_json("run.json", description)
    for name in ("coco", "virelay"):
        with pytest.raises(RunError, match=r"by a function of its own.*\n  Remedy: export csv"):
            export(other, name, tmp_path / name)
    export(other, "coco", tmp_path / "whole", findings=[one["id"] for one in findings(run) if not one["where"]["box"]])
    export(other, "fiftyone", tmp_path / "fiftyone")
    entries = json.loads((tmp_path / "fiftyone" / "samples.json").read_text("utf-8"))["samples"]
    assert {str(entry["relevance"]) for entry in entries} == {"None"}


def test_virelay_shows_whole_classes_and_whole_maps(small: Small, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    broken = small.copy(tmp_path / "photos")
    (broken / "rose" / "39.png").write_bytes(b"no picture")
    (broken / "rose" / "loose.png").write_bytes(b"no picture")
    audit = pfungst.audit(small.model, broken, out=tmp_path / "run", full_maps=True, **small.settings)
    audit.export("virelay", tmp_path / "out", findings=["f001"])
    with h5py.File(tmp_path / "out" / "attribution.h5") as file, h5py.File(tmp_path / "out" / "dataset.h5") as data:
        rows = [row for row, name in enumerate(audit.subject.data.ids) if name.encode() in data["id"][:]]
        assert rows == np.flatnonzero(audit.run.read_array("target")).tolist()
        assert np.array_equal(file["attribution"][:, 0], audit.run.read_array("relevance", np.array(rows)))
    with h5py.File(tmp_path / "out" / "analysis.h5") as file:
        assert list(file) == ["class00001"]
        assert sorted(set(file["class00001/cluster/findings"][:].tolist())) == [0, 1]
    audit.export("virelay", tmp_path / "all")
    with h5py.File(tmp_path / "all" / "attribution.h5") as file, h5py.File(tmp_path / "all" / "dataset.h5") as data:
        unread = np.flatnonzero(audit.run.read_array("status") == 0)
        assert len(unread) == 2
        assert not data["data"][unread].any()
        assert (file["attribution"][unread].sum((1, 2, 3)) > 0).all(), "ViRelAy divides by the greatest value"


def test_virelay_without_h5py(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"needs h5py\n  Remedy: pip install 'pfungst\[bridges\]'"):
        export(run, "virelay", tmp_path / "out")
    assert not (tmp_path / "out").exists()
