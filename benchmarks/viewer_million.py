"""The viewer's map with a million samples: time to the first picture, to the answer of a lasso, the server's memory.

    python benchmarks/viewer_million.py [--samples 1000000] [--out benchmarks/results/viewer_million.csv]

A run is made up (1000 classes, a map of each class, 30 columns) and shown by ``pfungst view`` in a process of its own;
a Chromium without a graphics card (SwiftShader) asks it.  A picture counts when its pixels can be read back.  Memory is
the most that the server held, the export of the selection as CSV included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pfungst.store import Run

CLASSES = 1000
BROWSER = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]

# In the page: when the map was drawn, with the time at which its pixels were there.
WATCH = """
window.drawn = [];
new MutationObserver((changes) => {
  const canvas = changes[0].target;
  const gl = canvas.getContext("webgl2");
  gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  window.drawn.push(performance.now());
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["data-drawn"] });
addEventListener("pointerup", () => { window.lifted = performance.now(); }, true);
"""


def make_run(folder: Path, count: int) -> Path:
    """A finished run without pictures or maps of relevance."""
    rng = np.random.default_rng(0)
    run = Run(folder / "million")
    names = [f"class {i:04d}" for i in range(CLASSES)]
    label = np.sort(rng.integers(0, CLASSES, count))
    prediction = np.where(rng.random(count) < 0.2, rng.integers(0, CLASSES, count), label)
    run.begin({
        "settings": {"seed": 0, "full_maps": False}, "preset": "epsilon-plus",
        "model": {"name": "none", "digest": "0", "preprocess": {"custom": "none"}},
        "data": {"root": "", "samples": count, "classes": names, "target": "label", "digest": "0"},
    })  # fmt: skip
    cluster = rng.integers(0, 4, count)
    places = rng.normal(size=(count, 2)) + 4 * np.column_stack([cluster % 2, cluster // 2])
    ids = [f"{names[c]}/{row:07d}.jpg" for row, c in enumerate(label)]
    columns: dict[str, Any] = {
        "id": ids, "path": [f"/data/pictures/{name}" for name in ids],
        "label": pa.array(names).take(pa.array(label)), "prediction": pa.array(names).take(pa.array(prediction)),
        "probability": rng.random(count, np.float32), "class": pa.array(names).take(pa.array(label)),
        "score": rng.normal(size=count), "absorbed": rng.normal(size=count), "cluster": cluster,
        "x": places[:, 0], "y": places[:, 1], "outlier": rng.gamma(9, 1 / 9, count),
        "finding": pa.array([f"f{row % 9 + 1:03d}" if row % 50 < 9 else None for row in range(count)]),
        "set_aside": pa.array([""] * count),
        **{f"property {i}": rng.normal(size=count) for i in range(16)},
    }  # fmt: skip
    run.write_table("samples.parquet", columns)
    ends = np.searchsorted(label, np.arange(CLASSES + 1))
    for index in range(CLASSES):
        rows = list(range(ends[index], ends[index + 1]))
        entry = {"class": names[index], "class_index": index, "rows": rows, "cluster": [0] * len(rows), "groups": []}
        run.write_json(f"classes/{index:04d}.json", entry)
    run.write_json("findings.json", {"version": 1, "untested": 0, "findings": []})
    run.finish("samples")
    return run.path


def serve(path: Path) -> tuple[subprocess.Popen[str], str]:
    """A server of its own, and its address."""
    code = "from pfungst.cli import main; main()"
    command = [sys.executable, "-u", "-c", code, "view", str(path), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return server, found.group(0)
    raise SystemExit("the server did not start")


def peak_memory(server: subprocess.Popen[str]) -> float:
    """Megabytes (10^6) that the server held at most, so far."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text).group(1)) * 1024 / 1e6  # type: ignore[union-attr]


def drive(address: str, layout: str) -> dict[str, float]:
    """Open the map and draw a lasso of 200 corners round its middle."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.add_init_script(WATCH)
        began = time.perf_counter()
        page.goto(f"{address}#view=map&layout={layout}&colour=outlier")
        page.locator(".plot > p", has_text="samples shown").wait_for(timeout=120_000)
        page.wait_for_timeout(3000)
        whole = time.perf_counter() - began - 3
        times = json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('resource'))"))
        arrived = max(one["responseEnd"] for one in times if "/points" in one["name"] or "/columns/" in one["name"])
        first = max(page.evaluate("window.drawn")) - arrived  # the last one, when all is there
        box = page.locator(".surface canvas").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x + 150, y)
        page.mouse.down()
        for step in range(1, 201):
            angle = 2 * np.pi * step / 200
            page.mouse.move(x + 150 * np.cos(angle), y + 150 * np.sin(angle))
        page.mouse.up()
        page.locator(".plot > p", has_text=re.compile(r", [\d,]+ selected")).wait_for(timeout=60_000)
        page.wait_for_timeout(3000)
        lifted = page.evaluate("window.lifted")
        asked = page.evaluate("performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/select'))"
                              ".map((e) => [e.startTime, e.responseEnd])")  # fmt: skip
        seen = max(page.evaluate("window.drawn"))
        words = page.locator(".plot > p").inner_text()
        links = page.locator(".gallery a", has_text="CSV")
        began = time.perf_counter()
        exported = page.request.get(f"{address.split('?')[0]}{links.get_attribute('href')}").body().count(b"\n") - 1
        export = time.perf_counter() - began
        browser.close()
    return {
        "whole_page_s": whole, "first_picture_s": first / 1e3, "lasso_answer_s": (asked[-1][1] - asked[-1][0]) / 1e3,
        "lasso_to_picture_s": (seen - lifted) / 1e3,
        "selected": int(re.search(r"([\d,]+) selected", words).group(1).replace(",", "")),  # type: ignore[union-attr]
        "exported": exported, "csv_export_s": export,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", default="benchmarks/results/viewer_million.csv")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_run(Path(folder), given.samples)
        for layout in ("all", "pair:4:6"):
            server, address = serve(path)
            try:
                found = drive(address, layout)
                memory = peak_memory(server)  # the export of the selection included
            finally:
                server.terminate()
                server.wait()
            device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, SwiftShader"
            told = {name: round(value, 3) for name, value in found.items()}
            rows.append({"device": device, "samples": given.samples, "layout": layout, **told,
                         "server_peak_mb": round(memory)})  # fmt: skip
            print(rows[-1])
    with Path(given.out).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
