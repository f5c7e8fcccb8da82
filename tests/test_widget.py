"""The map of samples: what Python sends, and what the page does with pointer and keys, in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import browse, check_missing, needs_browser

from pfungst import widget
from pfungst.charts import COLOURS
from pfungst.errors import RunError, SettingError
from pfungst.pipeline import Audit
from pfungst.store import Run

EVIL = '<img src=x onerror="document.title=1">'
WIDTH, HEIGHT, PAD = 600, 418, 14  # of the canvas within its border


def made_up(count: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-3, 5, count), rng.uniform(10, 12, count)
    group = [-1 if i % 3 == 0 else i % 3 - 1 for i in range(count)]
    groups = [{"name": name, "count": group.count(k), "colours": widget._both(f"g{k}")}
              for k, name in enumerate((f"f001, {EVIL}", "f002, refuted"))]  # fmt: skip
    ids = [f"a/{i:02d}.png" for i in range(count)]
    return {"title": f"class {EVIL}", "ids": ids, "x": x.tolist(), "y": y.tolist(), "group": group, "groups": groups,
            "rest": widget._both("rest")}  # fmt: skip


def places_of(points: dict[str, Any]) -> np.ndarray:
    """Where samples are on the canvas, worked out once more."""
    at = np.column_stack([points["x"], points["y"]])
    return PAD + (at - at.min(0)) / np.ptp(at, axis=0) * (np.array([WIDTH, HEIGHT]) - 2 * PAD)


def play(folder: Path, points: dict[str, Any], steps: str, style: str = "background:#fff;color:#111") -> Any:
    """The widget on a page with a model of its own; ``steps`` fill ``told``, which comes back."""
    code = (widget._STATIC / "sample_map.js").read_bytes()
    css = (widget._STATIC / "sample_map.css").read_text()
    page = folder / "page.html"
    page.write_text(f"""<meta charset="utf-8"><style>{css}</style>
<body style="margin:0;{style}"><div id="here" style="width:602px"></div><script type="module">
const state = {{points: {json.dumps(points)}, selected: []}}, listeners = {{}}, told = {{saved: 0}};
const model = {{get: (k) => state[k], set: (k, v) => {{ state[k] = v; }}, save_changes: () => {{ told.saved++; }},
  on: (k, f) => {{ (listeners[k] ??= new Set()).add(f); }}, off: (k, f) => {{ listeners[k].delete(f); }}}};
const fromPython = (k, v) => {{ state[k] = v; for (const f of listeners["change:" + k]) f(); }};
const el = document.getElementById("here");
const {{default: widget}} = await import("data:text/javascript;base64,{base64.b64encode(code).decode()}");
const close = widget.render({{model, el}});
const canvas = el.querySelector("canvas[tabindex]"), box = canvas.getBoundingClientRect();
const point = (type, [x, y], more = {{}}) => canvas.dispatchEvent(new PointerEvent(type, {{
  clientX: box.left + canvas.clientLeft + x, clientY: box.top + canvas.clientTop + y, pointerId: 1, bubbles: true,
  ...more}}));
const drag = (path, more) => {{ point("pointerdown", path[0], more);
  path.slice(1).forEach((p) => point("pointermove", p, more)); point("pointerup", path[path.length - 1], more); }};
const key = (name, more = {{}}) =>
  canvas.dispatchEvent(new KeyboardEvent("keydown", {{key: name, bubbles: true, ...more}}));
const press = (name) => [...el.querySelectorAll("button")].find((b) => b.textContent.startsWith(name)).click();
const words = () => el.querySelector("[role=status]").textContent;
try {{ {steps} }} catch (error) {{ told.error = String(error.stack); }}
document.body.dataset.told = JSON.stringify(told);
</script></body>""")
    dom = browse(folder, "--window-size=700,600", "--dump-dom", page.as_uri())
    found = re.search(r'data-told="([^"]*)"', dom)
    assert found, dom[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert "error" not in told, told
    return told


@needs_browser
def test_pointer_and_keys_select_samples(tmp_path: Path) -> None:
    points = made_up()
    places = places_of(points)
    triangle = np.array([[40.0, 60], [560, 200], [150, 390]])
    loop = np.concatenate([np.linspace(triangle[i], triangle[(i + 1) % 3], 20) for i in range(3)]).tolist()
    first = int(np.argmin(np.hypot(*(places - [300, 209]).T)))
    told = play(tmp_path, points, f"""
        told.size = [canvas.clientWidth, canvas.clientHeight];
        drag({json.dumps(loop)}); told.lasso = state.selected; told.afterLasso = words();
        press("rectangle");
        drag([[100, 100], [150, 300], [400, 250]]); told.rectangle = state.selected;
        drag([[400, 20], [580, 60]], {{shiftKey: true}}); told.added = state.selected;
        drag([[100, 100], [250, 400]], {{altKey: true}}); told.removed = state.selected;
        point("pointerdown", {json.dumps(places[7].tolist())}); point("pointerup", {json.dumps(places[7].tolist())});
        told.clicked = state.selected;
        key("Escape"); told.escaped = state.selected; told.afterEscape = words();
        point("pointermove", [-500, -500]);
        key("ArrowRight"); told.cursor = words(); key(" "); told.spaced = state.selected;
        key("ArrowLeft"); told.left = words(); key(" "); key(" "); told.twice = state.selected;
        key("a", {{ctrlKey: true}}); told.all = state.selected.length;
        press("f002"); told.group = state.selected;
        fromPython("selected", ["a/03.png", "a/04.png"]); told.python = words();
        told.title = document.title; told.images = document.images.length;
        told.text = el.textContent; told.focusable = canvas.tabIndex; told.label = canvas.getAttribute("aria-label");
        told.buttons = [...el.querySelectorAll("button")].map((b) => b.textContent);
        told.fetched = performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length;
        const before = told.saved; close(); told.left_over = Object.values(listeners).map((s) => s.size);
    """)  # fmt: skip
    ids = np.array(points["ids"])

    def within(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        return ((places > [x0, y0]) & (places < [x1, y1])).all(1)

    assert told["size"] == [WIDTH, HEIGHT]
    # A point is in a triangle where it lies on the same side of all its edges.
    edges = np.roll(triangle, -1, 0) - triangle
    sides = np.stack(
        [e[0] * (places[:, 1] - c[1]) - e[1] * (places[:, 0] - c[0]) for e, c in zip(edges, triangle, strict=True)]
    )
    in_triangle = (sides > 0).all(0) | (sides < 0).all(0)
    assert told["lasso"] == ids[in_triangle].tolist()
    assert 5 < in_triangle.sum() < 50
    assert told["afterLasso"] == f"{in_triangle.sum()} of 60 samples selected"
    box = within(100, 100, 400, 250)
    assert told["rectangle"] == ids[box].tolist()
    more = within(400, 20, 580, 60)
    assert more.any()
    assert told["added"] == ids[box | more].tolist()
    assert told["removed"] == ids[(box | more) & ~within(100, 100, 250, 400)].tolist()
    assert told["clicked"] == [ids[7]]
    assert told["escaped"] == []
    assert told["afterEscape"] == "0 of 60 samples selected"
    assert told["cursor"].startswith(f"{ids[first]}")
    assert told["spaced"] == [ids[first]]
    second = list(ids).index(told["left"].split(",")[0].split(";")[0])
    assert places[second, 0] < places[first, 0]
    assert told["twice"] == [ids[first]]
    assert told["all"] == 60
    assert told["group"] == [ids[i] for i in range(60) if points["group"][i] == 1]
    assert told["python"] == "2 of 60 samples selected"
    assert told["saved"] == 11
    assert (told["images"], told["title"], told["fetched"]) == (0, "", 0)
    assert EVIL in told["text"]
    assert told["focusable"] == 0
    assert "Arrow keys" in told["label"]
    assert told["buttons"][:3] == ["lasso", "rectangle", "clear"]
    assert told["left_over"] == [0, 0], "nothing of a closed widget listens on"


@needs_browser
@pytest.mark.parametrize(
    ("ground", "style"), [("light", "background:#fff;color:#111"), ("dark", "background:#111;color:#ddd")]
)
def test_points_have_the_colours_of_their_groups(tmp_path: Path, ground: str, style: str) -> None:
    points = {**made_up(4), "x": [0, 0, 9, 9], "y": [0, 9, 0, 9], "group": [-1, 0, 1, 0]}
    told = play(tmp_path, points, """
        const ratio = canvas.width / canvas.clientWidth, brush = canvas.getContext("2d");
        told.colours = [[14, 14], [14, 404], [586, 14], [586, 404], [300, 200]].map(([x, y]) =>
          [...brush.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data]);
        fromPython("points", {...state.points, group: [1, 1, 1, 1], title: "changed"});
        told.after = [...brush.getImageData(Math.round(14 * ratio), Math.round(404 * ratio), 1, 1).data];
        told.text = el.textContent;
    """, style)  # fmt: skip
    expected = [
        [int(COLOURS[ground][name][i : i + 2], 16) for i in (1, 3, 5)] + [255] for name in ("rest", "g0", "g1", "g0")
    ]
    assert told["colours"] == [*expected, [0, 0, 0, 0]]
    assert told["after"] == expected[2]
    assert "changed" in told["text"]


def test_points_are_those_of_the_run(finished: Path) -> None:
    run = Run(finished)
    points = widget.read_points(run, "rose")
    table = {row["id"]: row for row in pq.read_table(finished / "samples.parquet").to_pylist()}
    assert set(points["ids"]) == {
        name for name, row in table.items() if row["class"] == "rose" and row["x"] is not None
    }
    names = [None if g < 0 else points["groups"][g]["name"].split(",")[0] for g in points["group"]]
    for name, x, y, group in zip(points["ids"], points["x"], points["y"], names, strict=True):
        assert (x, y, group) == (table[name]["x"], table[name]["y"], table[name]["finding"])
    for number, one in enumerate(points["groups"]):
        assert one["count"] == points["group"].count(number) + len(one["also"])
        assert one["name"].split(", ")[1] in ("confirmed", "open", "refuted")
    clusters = widget.read_points(run, "rose", "cluster")
    for name, group in zip(clusters["ids"], clusters["group"], strict=True):
        assert clusters["groups"][group]["name"] == f"cluster {table[name]['cluster']}"
    json.dumps(points, allow_nan=False)
    with pytest.raises(RunError, match="leaf, rose"):
        widget.read_points(run, "tulip")
    with pytest.raises(SettingError, match="finding, cluster"):
        widget.read_points(run, "rose", "colour")


def test_a_group_has_the_members_that_are_drawn_as_another_one(finished: Path, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(finished, tmp_path / "run")))
    content = run.read_json("findings.json")
    first = content["findings"][0]
    content["findings"].append(
        {**first, "id": "f008", "rank": 8, "samples": first["samples"][:3], "verdict": "refuted"}
    )
    run.write_json("findings.json", content)
    points = widget.read_points(run, "rose")
    (group,) = (one for one in points["groups"] if one["name"] == "f008, refuted")
    assert group["count"] == 3
    assert [points["ids"][i] for i in group["also"]] == sorted(first["samples"][:3])
    assert points["groups"].index(group) not in points["group"]


@needs_browser
def test_all_members_of_a_group_are_selected(tmp_path: Path) -> None:
    points = made_up(60)
    others = [i for i in range(60) if points["group"][i] == 0][:2]
    points["groups"][1] |= {"also": others, "count": points["groups"][1]["count"] + 2}
    told = play(
        tmp_path,
        points,
        """
        press("f002"); told.group = state.selected; told.text = el.textContent;
    """,
    )
    assert told["group"] == [points["ids"][i] for i in range(60) if points["group"][i] == 1 or i in others]
    assert f"f002, refuted ({points['groups'][1]['count']}, {points['group'].count(1)} in this colour)" in told["text"]


def test_the_widget_and_python_share_the_selection(finished: Path) -> None:
    pytest.importorskip("anywidget")
    audit = Audit(Run(finished), None)  # type: ignore[arg-type]
    shown = widget.sample_map(audit, "rose")
    assert shown.selected == []
    seen: list[Any] = []
    shown.observe(lambda change: seen.append(change["new"]), "selected")
    ids = shown.points["ids"]
    shown.selected = [ids[5], ids[2]]
    assert shown.selected == [ids[2], ids[5]]
    shown.set_state({"selected": [ids[9]]})  # what the page sends
    assert seen == [[ids[2], ids[5]], [ids[9]]]
    with pytest.raises(SettingError, match="nowhere"):
        shown.selected = ["nowhere.png"]
    state = shown.get_state()
    assert "export default" in str(state["_esm"])
    assert ".pfungst-map" in str(state["_css"])
    finding = audit.findings[0]
    of_finding = widget.sample_map(finding)
    assert set(of_finding.selected) == set(finding.samples)
    assert widget.sample_map(str(finished), "leaf").points["title"].startswith("class leaf")


def test_a_missing_anywidget_is_an_error_that_names_the_command() -> None:
    check_missing("anywidget", "notebook", "pfungst.widget._make_class()")
