"""The map of samples in the viewer: outlines, columns, layouts, selections, exports, and the page."""

from __future__ import annotations

import io
import json
import sys
import time
import types
import zipfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pfungst.store import BLOCK, Run
from pfungst.viewer.lassos import Plane
from pfungst.viewer.layouts import _MAKERS
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.selections import MOST_UNNAMED
from pfungst.viewer.server import Viewer, make_app

N = 120  # samples, three classes of 40; pictures of the first six are there
CLASSES = ["cat", "dog", "owl"]
HERE = "/api/runs/0"


def slow_inside(x: float, y: float, corners: list[tuple[float, float]]) -> bool:
    """The even-odd rule as it is written in books: a ray to the right crosses an odd number of edges."""
    inside = False
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
    return inside


def random_corners(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "star":  # crosses itself
        angle = 4 * np.pi * np.arange(5) / 5 + rng.uniform(0, 6)
        return np.column_stack([np.cos(angle), np.sin(angle)])
    if kind == "tangle":
        return rng.normal(size=(200, 2))
    angle = np.sort(rng.uniform(0, 2 * np.pi, 40))
    return np.column_stack([np.cos(angle), np.sin(angle)]) * rng.uniform(0.4, 1.4, (40, 1))


@pytest.mark.parametrize("kind", ["star", "tangle", "blob"])
def test_polygons_select_what_matplotlib_and_a_slow_loop_select(kind: str) -> None:
    path = pytest.importorskip("matplotlib.path")
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40_000, 2)).astype(np.float32)
    rows = np.sort(rng.choice(100_000, len(points), replace=False))
    corners = random_corners(kind, rng).astype(np.float32)
    found = Plane(rows, points).in_polygon(corners)
    assert (np.diff(found.astype(int)) > 0).all()
    slow = [slow_inside(*map(float, point), corners.astype(float).tolist()) for point in points[:3000]]
    assert np.isin(rows[:3000], found).tolist() == slow
    if kind != "tangle":  # matplotlib follows another rule where edges cross twice
        theirs = path.Path(corners.astype(float), closed=False).contains_points(points)
        if kind == "star":  # its pentagon is wound round twice, which only the even-odd rule leaves out
            theirs &= ~path.Path(_pentagon(corners)).contains_points(points)
        assert np.array_equal(np.isin(rows, found), theirs)


def _pentagon(star: np.ndarray) -> np.ndarray:
    """The inner pentagon of a star: smaller by the golden ratio squared, turned by half."""
    order = np.argsort(np.arctan2(star[:, 1], star[:, 0]))
    return -star[order].astype(float) / ((1 + 5**0.5) / 2) ** 2


def test_points_on_edges_belong_to_one_of_two_neighbours() -> None:
    grid = np.array([(x, y) for x in range(9) for y in range(9)], np.float32)
    plane = Plane(np.arange(len(grid)), grid)
    squares = [np.array([(x, y), (x + 4, y), (x + 4, y + 4), (x, y + 4)]) for x in (0, 4) for y in (0, 4)]
    found = [plane.in_polygon(square) for square in squares]
    assert [len(one) for one in found] == [16] * 4
    assert len(np.unique(np.concatenate(found))) == 64
    halves = [plane.in_polygon(np.array(half)) for half in ([(0, 0), (8, 0), (8, 8)], [(0, 0), (8, 8), (0, 8)])]
    assert sum(map(len, halves)) == len(np.union1d(*halves)) == 64
    assert len(plane.in_box(8, 8, 0, 0)) == 81  # a box has its border
    assert plane.in_box(2, 3, 2, 3).tolist() == [21]


@pytest.mark.parametrize(
    "corners", [[(0, 0)] * 3, [(0, 0), (4, 4), (8, 8)], [(0, 4), (4, 4), (8, 4)], [(4, 0), (4, 8)]]
)
def test_polygons_without_area_hold_nothing(corners: list[tuple[int, int]]) -> None:
    grid = np.array([(x, y) for x in range(9) for y in range(9)], np.float32)
    assert len(Plane(np.arange(81), grid).in_polygon(np.array(corners))) == 0


def test_a_million_points_and_200_corners_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    plane = Plane(np.arange(1_000_000), rng.normal(size=(1_000_000, 2)))
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    began = time.perf_counter()
    found = plane.in_polygon(np.column_stack([np.cos(angle), np.sin(angle)]))
    assert time.perf_counter() - began < 1
    assert abs(len(found) / 1e6 - (1 - np.exp(-0.5))) < 0.002  # the mass of a Gaussian within one deviation


# ---- a run --------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    """A finished run of random maps, written as an audit writes it."""
    rng = np.random.default_rng(0)
    run = Run(folder / "run")
    label = np.repeat(np.arange(3), 40)
    prediction = np.where(np.arange(N) % 10 == 0, (label + 1) % 3, label)
    (folder / "pictures").mkdir()
    for row in range(6):
        Image.new("RGB", (20, 10), (40 * row, 0, 0)).save(folder / "pictures" / f"{row}.png")
    run.begin({
        "settings": {"seed": 0, "full_maps": False}, "preset": "epsilon-plus",
        "model": {"name": "m", "digest": "d", "preprocess": {"custom": "f"}},
        "data": {"root": "", "samples": N, "classes": CLASSES, "target": "label", "digest": "e"},
    })  # fmt: skip
    run.create_arrays(N, {"where": ((6, 6), "float16"), "status": ((), "int8")})
    where = rng.normal(size=(N, 6, 6)) + 3 * np.eye(6)[label][:, None]
    assert N <= BLOCK
    run.write_block(0, {"where": where, "status": np.ones(N, np.int8)})
    for index in range(3):
        rows = np.flatnonzero(label == index).tolist()
        entry = {"class": CLASSES[index], "class_index": index, "rows": rows, "cluster": [0] * 40, "groups": []}
        run.write_json(f"classes/{index:04d}.json", entry)
        if index < 2:
            kept = {"rows": rows, "x": rng.normal(size=40).tolist(), "y": rng.normal(size=40).tolist()}
            run.write_json(f"embeddings/{index:04d}.json", kept)
    ids = [f"../{CLASSES[label[row]]}/{row}.png" for row in range(N)]
    finding = {
        "id": "f001", "rank": 1, "class": "cat", "class_index": 0, "samples": ids[:5], "central": [], "rim": [],
        "nearest": [], "exemplars": [], "verdict": "confirmed", "size": 5, "prevalence": 0.1, "suspicion": 1.0,
        "views": [], "where": {"kind": "moving"}, "summary": "", "p": 0.0, "reason": "",
    }  # fmt: skip
    # Two more of the same pictures and others: a sample is coloured by the first of the report, f003 by none.
    more = [("f002", 2, ids[3:10], "refuted"), ("f003", 3, ids[4:8], "refuted")]
    findings = [
        finding,
        *({**finding, "id": a, "rank": b, "samples": c, "size": len(c), "verdict": d} for a, b, c, d in more),
    ]
    run.write_json("findings.json", {"version": 1, "untested": 0, "findings": findings})
    places = [run.read_json(f"embeddings/{index:04d}.json") for index in range(2)]
    run.write_table("samples.parquet", {
        "id": ids, "path": [str(folder / "pictures" / f"{row}.png") for row in range(N)],
        "label": [CLASSES[i] for i in label], "prediction": [CLASSES[i] for i in prediction],
        "probability": rng.uniform(size=N), "class": [CLASSES[i] for i in label], "score": rng.normal(size=N),
        "cluster": [0] * 80 + [None] * 40, "outlier": [1.5] * 80 + [None] * 40,
        "x": [*places[0]["x"], *places[1]["x"]] + [None] * 40, "y": [*places[0]["y"], *places[1]["y"]] + [None] * 40,
        "finding": ["f001"] * 5 + ["f002"] * 5 + [None] * 110, "set_aside": [""] * N,
        "a/b?": [f"s{i % 2}" for i in range(N)],
    })  # fmt: skip
    run.finish("samples")
    return run.path


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = make_app(Viewer([OpenRun(make_run(tmp_path))]), "t")
    with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"}) as found:
        yield found


def asked(client: TestClient, path: str, body: Any = None) -> Any:
    answer = client.get(HERE + path) if body is None else client.post(HERE + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def rows_of(answer: Any) -> list[int]:
    return np.frombuffer(answer.content, "<u4").tolist()  # type: ignore[no-any-return]


def test_columns_are_those_of_the_file_and_what_follows_from_them(client: TestClient, tmp_path: Path) -> None:
    listed = asked(client, "/columns").json()
    kinds = {one["name"]: one["kind"] for one in listed["columns"]}
    assert (kinds["id"], kinds["label"], kinds["probability"], kinds["cluster"]) == (
        "text", "category", "number", "category",
    )  # fmt: skip
    table = pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()
    values = {one["name"]: [*one["values"], *[None] * 9] for one in listed["columns"]}
    for name in ("label", "prediction", "finding", "a%2Fb%3F"):
        codes = np.frombuffer(asked(client, f"/columns/{name}").content, "<u4")
        plain = name.replace("%2F", "/").replace("%3F", "?")
        assert [None if code == 2**32 - 1 else values[plain][code] for code in codes] == table[plain]
    right = np.frombuffer(asked(client, "/columns/correct").content, "<u4")
    assert right.tolist() == [int(a != b) for a, b in zip(table["label"], table["prediction"], strict=True)]
    outlier = np.frombuffer(asked(client, "/columns/outlier").content, "<f4")
    assert (outlier[:80] == 1.5).all()
    assert np.isnan(outlier[80:]).all()
    assert client.get(HERE + "/columns/id").status_code == 422
    assert client.get(HERE + "/columns/..%2Frun.json").status_code == 404


def test_a_sample_of_several_findings_is_a_member_of_each(client: TestClient) -> None:
    columns = {one["name"]: one for one in asked(client, "/columns").json()["columns"]}
    assert columns["finding"]["values"] == ["f001", "f002", "f003"], "f003, too, which colours nothing"
    assert [name for name, one in columns.items() if one["several"]] == ["finding"]
    members = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8, 9], [4, 5, 6, 7]]
    assert rows_of(asked(client, "/members/finding")) == [part for one in members for part in (len(one), *one)]
    assert client.get(HERE + "/members/label").status_code == 422
    told = asked(client, "/facts", {"rows": [4, 0, 11, 8]}).json()
    assert [one["findings"] for one in told] == [["f001", "f002", "f003"], ["f001"], [], ["f002"]]
    verdicts = rows_of(asked(client, "/columns/verdict"))
    assert verdicts[:11] == [0] * 5 + [2] * 5 + [2**32 - 1], "of the first of the report"
    asked(client, "/findings/f003/judgements", {"answer": "cheat"})
    assert rows_of(asked(client, "/columns/judged"))[:9] == [2**32 - 1] * 4 + [0] * 4 + [2**32 - 1]


def test_columns_are_kept_by_a_browser_until_somebody_judges(client: TestClient) -> None:
    version = asked(client, "/columns").json()["version"]
    path = f"/columns/judged?version={version}"
    before = asked(client, path)
    assert "immutable" in before.headers["cache-control"]
    assert set(rows_of(before)) == {2**32 - 1}
    asked(client, "/findings/f001/judgements", {"answer": "legitimate"})
    after = asked(client, path)
    assert after.headers["cache-control"] == "no-store"
    assert rows_of(after)[:6] == [1] * 5 + [2**32 - 1]


def test_layouts_are_the_runs_or_computed_on_request(client: TestClient, tmp_path: Path) -> None:
    listed = asked(client, "/layouts").json()
    assert [(one["class"], one["kept"]) for one in listed["classes"]] == [("cat", True), ("dog", True), ("owl", False)]
    kept = np.frombuffer(asked(client, "/layouts/tsne:0/points").content, "<f4").reshape(N, 2)
    theirs = Run(tmp_path / "run").read_json("embeddings/0000.json")
    assert kept[:40, 0].tolist() == [np.float32(x) for x in theirs["x"]]
    assert np.isnan(kept[40:]).all()
    sides = np.frombuffer(asked(client, "/layouts/all/points").content, "<f4").reshape(N, 2)
    for rows, column in ((slice(0, 40), 0), (slice(40, 80), 1)):
        assert ((sides[rows, 0] > column) & (sides[rows, 0] < column + 1)).all()
        assert ((sides[rows, 1] > -1) & (sides[rows, 1] < 0)).all()
    for name in ("tsne:2", "spectral:0"):
        assert asked(client, f"/layouts/{name}").json() == {"state": "absent"}
        assert client.get(f"{HERE}/layouts/{name}/points").status_code == 409
        asked(client, f"/layouts/{name}", {})
        assert wait_for(client, name) == {"state": "ready", "points": 40}
        assert len(np.unique(asked(client, f"/layouts/{name}/points").content)) > 0
    for name in ("tsne:3", "tsne:-1", "pca:0", "pair:0", "pair:0:99", "pair:0:1", "tsne:٣"):
        assert client.get(f"{HERE}/layouts/{name}").status_code in (404, 422)
    assert not (tmp_path / "run" / "embeddings" / "0002.json").exists()


def test_umap_is_there_where_its_package_is(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "umap" not in asked(client, "/layouts").json()["kinds"] or find_spec("umap")
    package = types.ModuleType("umap")
    package.__spec__ = ModuleSpec("umap", None)
    fake = types.SimpleNamespace(fit_transform=lambda vectors: vectors[:, :2])
    package.UMAP = lambda random_state: fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", package)
    assert "umap" in asked(client, "/layouts").json()["kinds"]
    asked(client, "/layouts/umap:1", {})
    assert wait_for(client, "umap:1") == {"state": "ready", "points": 40}


def test_one_map_is_computed_at_a_time_and_can_be_stopped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(vectors: np.ndarray, seed: int, go_on: Any) -> np.ndarray:
        for step in range(1000):
            go_on(step + 1, 1000)
            time.sleep(0.01)
        return vectors[:, :2]

    monkeypatch.setitem(_MAKERS, "spectral", slow)
    asked(client, "/layouts/spectral:0", {})
    time.sleep(0.1)
    told = asked(client, "/layouts/spectral:0").json()
    assert told["state"] == "working"
    assert 0 < told["done"] < told["total"] == 1000
    assert 5 < told["seconds_left"] < 60
    assert client.post(HERE + "/layouts/tsne:2", json={}).status_code == 409
    assert client.delete(HERE + "/layouts/spectral:0").status_code == 200
    assert wait_for(client, "spectral:0")["failure"] == "stopped"
    monkeypatch.setitem(_MAKERS, "spectral", lambda *_: 1 / 0)
    asked(client, "/layouts/spectral:0", {})
    assert "ZeroDivisionError" in wait_for(client, "spectral:0")["failure"]


def wait_for(client: TestClient, name: str) -> dict[str, Any]:
    until = time.monotonic() + 20
    while True:
        told: dict[str, Any] = asked(client, f"/layouts/{name}").json()
        if told["state"] != "working" or time.monotonic() > until:
            return told
        time.sleep(0.02)


def test_outlines_select_on_the_server(client: TestClient) -> None:
    names = [one["name"] for one in asked(client, "/columns").json()["columns"]]
    layout = f"pair:{names.index('probability')}:{names.index('score')}"
    points = np.frombuffer(asked(client, f"/layouts/{layout}/points").content, "<f4").reshape(N, 2)
    assert points.min(0).tolist() == [0, 0]
    assert points.max(0).tolist() == [1, 1]
    found = rows_of(asked(client, "/select", {"layout": layout, "polygon": [0, 0, 1, 0, 0, 1]}))
    assert found == np.flatnonzero(points.sum(1) < 1).tolist()
    assert rows_of(asked(client, "/select", {"layout": layout, "box": [0, 0, 1, 1]})) == list(range(N))
    for wrong in ({}, {"polygon": [0, 0, 1]}, {"polygon": [0, 0, 1, 1]}, {"box": [1]}, {"polygon": [0] * 4001},
                  {"polygon": [0, 0, 1, 0, 0, 1e39]}, {"box": [0, 0, 1, 1], "polygon": [0] * 6}):  # fmt: skip
        assert client.post(HERE + "/select", json={"layout": layout, **wrong}).status_code == 422
    assert asked(client, "/facts", {"rows": [7, 3]}).json()[1]["id"] == "../cat/3.png"
    assert client.post(HERE + "/facts", json={"rows": [N]}).status_code == 422


def test_selections_and_views_are_kept_under_names_and_bounded(client: TestClient, tmp_path: Path) -> None:
    first = asked(client, "/selections", {"rows": [5, 1, 5], "name": "odd ones"}).json()
    assert rows_of(asked(client, f"/selections/{first['id']}")) == [1, 5]
    assert asked(client, "/selections", {"rows": [1, 5]}).json()["name"] == "odd ones"  # a link does not take it away
    others = [asked(client, "/selections", {"rows": [row]}).json()["id"] for row in range(MOST_UNNAMED + 1)]
    assert client.get(f"{HERE}/selections/{others[0]}").status_code == 404
    assert len(list((tmp_path / "run" / "selections").iterdir())) == MOST_UNNAMED + 1
    asked(client, "/views", {"name": "a/b", "state": "view=map&colour=label"})
    asked(client, "/views", {"name": "a/b", "state": "view=map"})
    kept = asked(client, "/views").json()
    assert [one["name"] for one in kept["selections"]] == ["odd ones"]
    assert [(one["name"], one["state"]) for one in kept["views"]] == [("a/b", "view=map")]
    assert client.delete(f"{HERE}/views/a%2Fb").status_code == 200
    assert client.delete(f"{HERE}/selections/{first['id']}").status_code == 200
    assert client.get(f"{HERE}/selections/{first['id']}").status_code == 404
    for wrong in ({"name": "x"}, {"name": "a\nb", "rows": [1]}, {"rows": [N]}, {"rows": [-1]}, {"bits": "!"},
                  {"bits": "eNoDAAAAAAE="}):  # fmt: skip
        assert client.post(HERE + "/selections", json=wrong).status_code == 422
    foreign = {"views": [], "selections": [{"id": "../../x", "name": "", "at": ""}]}
    (tmp_path / "run" / "views.json").write_text(json.dumps(foreign))
    assert client.get(HERE + "/selections/..%2F..%2Fx").status_code == 404
    assert "damaged" in client.get(HERE + "/views").json()["error"]


def test_a_selection_goes_out_in_every_format(client: TestClient, tmp_path: Path) -> None:
    rows = [1, 5, 9]
    table = pq.read_table(io.BytesIO(asked(client, "/export", {"rows": rows, "format": "parquet"}).content))
    ids = [f"../cat/{row}.png" for row in rows]
    assert table.column("id").to_pylist() == ids
    assert table.column("findings").to_pylist() == [["f001"], ["f002", "f003"], ["f002"]]
    read = pyarrow.csv.read_csv(io.BytesIO(asked(client, "/export", {"rows": rows, "format": "csv"}).content))
    assert read.column("score").to_pylist() == pytest.approx(table.column("score").to_pylist())
    content = json.loads(asked(client, "/export", {"rows": rows, "format": "json"}).content)
    assert [one["id"] for one in content] == ids
    kept = asked(client, "/selections", {"rows": rows}).json()["id"]
    answer = asked(client, f"/selections/{kept}/export?format=zip")
    assert answer.headers["content-disposition"].startswith('attachment; filename="run_')
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["pictures/cat/1.png", "pictures/cat/5.png", "samples.csv"]
        assert archive.read("pictures/cat/5.png") == (tmp_path / "pictures" / "5.png").read_bytes()
        listed = pyarrow.csv.read_csv(io.BytesIO(archive.read("samples.csv")))
    assert listed.column("file").to_pylist() == ["pictures/cat/1.png", "pictures/cat/5.png", ""]
