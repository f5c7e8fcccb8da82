"""The viewer's server: who is answered, what is sent, what a judgement leaves behind; without a browser."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfungst.errors import RunError, SettingError
from pfungst.judgements import last_answer, read_judgements, write_judgement
from pfungst.store import Run
from pfungst.viewer.access import MOST_BYTES, cookie_name
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.server import Viewer, make_app, serve, watch

testclient = pytest.importorskip("starlette.testclient")
TOKEN = "a-token-of-this-test"
HERE = "http://127.0.0.1:8123"
KEY = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def client(run: Path) -> Any:
    return testclient.TestClient(make_app(Viewer([OpenRun(run)]), TOKEN), HERE, headers=KEY)


def stranger(run: Path, **headers: str) -> Any:
    """A client without the token."""
    return testclient.TestClient(make_app(Viewer([OpenRun(run)]), TOKEN), HERE, headers=headers)


# ---- who is answered -------------------------------------------------------------------------------------------------


def test_the_token_opens_the_page_and_its_cookie_the_rest(run: Path) -> None:
    visitor = stranger(run)
    assert visitor.get("/").status_code == 403
    assert visitor.get("/?token=wrong").status_code == 403
    assert visitor.get(f"/api/runs?token={TOKEN}").status_code == 403, "a token in the address opens the page alone"
    page = visitor.get(f"/?token={TOKEN}")
    assert page.status_code == 200
    assert "app.js" in page.text
    cookie = page.headers["set-cookie"]
    assert cookie.startswith(f"{cookie_name(TOKEN)}={TOKEN}")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert visitor.get("/api/runs").status_code == 200
    assert visitor.get("/static/app.js").status_code == 200
    other = stranger(run, Cookie=f"{cookie_name(TOKEN)}=wrong")
    assert other.get("/api/runs").status_code == 403
    assert other.get("/static/app.js").status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8123", 200), ("localhost:9000", 200), ("[::1]:80", 200), ("localhost", 200),
        ("evil.example", 400), ("127.0.0.1.evil.example", 400), ("localhost.evil.example:8123", 400), ("", 400),
        ("[", 400),
    ],
)  # fmt: skip
def test_names_that_are_made_to_point_here_are_refused(run: Path, host: str, status: int) -> None:
    assert stranger(run, Host=host, **KEY).get("/api/runs").status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": HERE}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": HERE}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": HERE}, 403),
        ({}, 403),
    ],
)
def test_another_sites_page_cannot_judge(run: Path, headers: dict[str, str], status: int) -> None:
    visitor = stranger(run, Cookie=f"{cookie_name(TOKEN)}={TOKEN}", **headers)
    answer = visitor.post("/api/runs/0/findings/f001/judgements", json={"answer": "cheat"})
    assert answer.status_code == status
    assert len(read_judgements(Run(run))[0]) == (status == 200)


def test_a_page_elsewhere_cannot_read_either(run: Path) -> None:
    visitor = stranger(run, Cookie=f"{cookie_name(TOKEN)}={TOKEN}", **{"Sec-Fetch-Site": "cross-site"})
    assert visitor.get("/api/runs").status_code == 403
    assert visitor.get("/").status_code == 200, "a link to the page may be followed"


def test_large_requests_are_refused(client: Any) -> None:
    where = "/api/runs/0/findings/f001/judgements"
    told = client.post(where, content=b" " * (MOST_BYTES + 1), headers={"Content-Type": "application/json"})
    assert told.status_code == 413

    def pieces() -> Iterator[bytes]:  # sent without saying how much it will be
        for _ in range(MOST_BYTES // 65536 + 2):
            yield b" " * 65536

    chunked = client.post(where, content=pieces(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert client.get("/api/runs", headers={"Content-Length": "many"}).status_code == 413


def test_nothing_is_loaded_from_elsewhere(client: Any, run: Path) -> None:
    answers = [client.get(path) for path in ("/", "/static/app.js", "/api/runs", "/nowhere")]
    for answer in (*answers, stranger(run).get("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    for name in ("index.html", "app.js", "app.css"):
        text = client.get(f"/static/{name}" if name != "index.html" else "/").text
        links = [word for word in text.replace('"', " ").replace("'", " ").split() if word.startswith("http")]
        assert all("www.w3.org" in link for link in links), links
        assert "eval(" not in text


# ---- nothing leaves the run folder -----------------------------------------------------------------------------------

TRAVERSALS = [
    "/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/static/%2fetc%2fpasswd",
    "/api/runs/0/findings/../run.json", "/api/runs/0/findings/..%2f..%2frun.json",
    "/api/runs/0/findings/f001/pictures/..%2f..%2f..%2frun.json", "/api/runs/0/findings/f001/pictures/verdict.json",
    "/api/runs/0/findings/..%2ff001/pictures/mean", "/api/runs/0/findings/f001/pictures/exemplar_00_..%2f..%2fmean",
    "/api/runs/0/findings/f001/pictures/exemplar_0", "/api/runs/0/findings/f001%00/pictures/mean",
    "/api/runs/0/samples/-1/picture", "/api/runs/0/samples/80/picture", "/api/runs/0/samples/99999999999/relevance",
    "/api/runs/1/findings", "/api/runs/-1/findings", "/api/runs/0/findings/f099",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_paths_lead_nowhere_else(client: Any, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 422), answer.text[:200]


def test_links_out_of_the_run_folder_are_not_followed(client: Any, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    mean = run / "findings" / "f001" / "mean.png"
    mean.unlink()
    mean.symlink_to(secret)
    assert client.get("/api/runs/0/findings/f001/pictures/mean").status_code == 404
    assert client.get("/api/runs/0/findings/f001/pictures/mask").status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"answer": "cheat"}', "text/plain", 415), (b"{", "application/json", 400), (b"[]", "application/json", 422),
        (b"{}", "application/json", 422), (b'{"answer": "yes"}', "application/json", 422),
        (b'{"answer": 1}', "application/json", 422), (b'{"answer": "cheat", "more": 1}', "application/json", 422),
        (b'{"answer": "cheat", "note": null}', "application/json", 200), (b"[" * 100_000, "application/json", 400),
        (json.dumps({"answer": "cheat", "note": "x" * 10_001}).encode(), "application/json", 422),
    ],
)  # fmt: skip
def test_bodies_are_checked(client: Any, body: bytes, kind: str, status: int) -> None:
    where = "/api/runs/0/findings/f001/judgements"
    answer = client.post(where, content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status != 200)


# ---- what is sent ----------------------------------------------------------------------------------------------------


def test_findings_are_those_of_the_run(client: Any, run: Path) -> None:
    (overview,) = client.get("/api/runs").json()
    content = json.loads((run / "findings.json").read_text())
    assert overview["samples"] == 80
    assert sum(overview["counts"].values()) == len(content["findings"])
    listed = client.get("/api/runs/0/findings").json()
    assert listed["torn"] == 0
    assert {one["id"] for one in listed["findings"]} == {one["id"] for one in content["findings"]}
    order = [one["verdict"] for one in listed["findings"]]
    assert order == sorted(order, key=["confirmed", "open", "refuted"].index)
    ids = Run(run).path
    report = (run / "report.html").read_text()
    for record in content["findings"]:
        found = client.get(f"/api/runs/0/findings/{record['id']}").json()
        names = [client.get(f"/api/runs/0/samples/{row}").json()["id"] for row in found["rows"]]
        assert sorted(names) == sorted(record["samples"]), ids
        assert found["evidence"] == record["evidence"]
        assert len(found["exemplars"]) == len(record["exemplars"])
        assert found["spectrum"]["eigenvalues"]
        assert found["spectrum"]["chart"].count("<rect") == min(12, len(found["spectrum"]["eigenvalues"]))
        assert found["chart"] in report, "the report shows the same chart"
        assert found["spectrum"]["chart"] in report
        told = [found["head"], *(line for fact in found["facts"] for line in fact["lines"]),
                *(one["caption"] for one in found["experiment"])]  # fmt: skip
        assert [text for text in told if escape(text) not in report] == []
        for name in ("mean", "mask", "why", *(one["name"] for one in found["experiment"]), "exemplar_00_input"):
            picture = client.get(f"/api/runs/0/findings/{record['id']}/pictures/{name}")
            assert Image.open(io.BytesIO(picture.content)).format == "PNG"
    assert {one["class"] for one in client.get("/api/runs/0/classes").json()} == {"leaf", "rose"}


def test_samples_are_those_of_the_run(client: Any, run: Path) -> None:
    where = Run(run).read_array("where")
    for row in (0, 41, 79):
        answer = client.get(f"/api/runs/0/samples/{row}/relevance")
        shape = int(answer.headers["X-Height"]), int(answer.headers["X-Width"])
        np.testing.assert_array_equal(np.frombuffer(answer.content, "<f4").reshape(shape), where[row])
        told = client.get(f"/api/runs/0/samples/{row}").json()
        original = Image.open(told["path"]).convert("RGB")
        for part in ("whole", "input"):
            sent = client.get(f"/api/runs/0/samples/{row}/picture?side=1024&part={part}")
            picture = Image.open(io.BytesIO(sent.content))
            shrunk = picture.resize(original.size, Image.Resampling.BOX)
            assert np.abs(np.asarray(shrunk, float) - np.asarray(original, float)).mean() < 6
    assert client.get("/api/runs/0/samples/0/picture?side=0").status_code == 422
    assert client.get("/api/runs/0/samples/0/picture?part=other").status_code == 422
    assert client.get("/api/runs/0/samples/0/picture?path=/etc/passwd").status_code == 422


def test_pictures_that_were_moved(run: Path, small: Any, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(small.photos, tmp_path / "moved"))
    gone = OpenRun(run, tmp_path / "nowhere")
    client = testclient.TestClient(make_app(Viewer([gone, OpenRun(run, photos)]), TOKEN), HERE, headers=KEY)
    answer = client.get("/api/runs/0/samples/3/picture")
    assert answer.status_code == 404
    assert "--images" in answer.json()["error"]
    assert client.get("/api/runs/1/samples/3/picture").status_code == 200


# ---- judgements ------------------------------------------------------------------------------------------------------


def test_a_judgement_is_on_disk_at_once_and_can_be_taken_back(client: Any, run: Path) -> None:
    where = "/api/runs/0/findings/f001/judgements"
    said = client.post(where, json={"answer": "cheat", "note": "a yellow corner"}).json()
    assert said["id"] == "f001"
    assert last_answer(said) == "cheat"
    (written,), torn = read_judgements(Run(run))
    assert (written.answer, written.note, written.finding, torn) == ("cheat", "a yellow corner", "f001", 0)
    taken = client.post(where, json={"answer": "withdrawn"}).json()
    assert last_answer(taken) == ""
    assert [one["answer"] for one in taken["judgements"]] == ["cheat", "withdrawn"]


def test_another_tab_or_command_line_is_told(run: Path) -> None:
    opened = OpenRun(run)

    async def follow() -> list[str]:
        events = watch(opened.version)
        first = await anext(events)
        write_judgement(opened.run, "f001", "legitimate")
        second = await asyncio.wait_for(anext(events), 5)
        await events.aclose()  # type: ignore[attr-defined]
        return [first, second]

    first, second = asyncio.run(follow())
    assert first == "data: 0\n\n"
    assert second.startswith("data: ")
    assert second != first


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_every_call_keeps_to_its_description(run: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    app = make_app(Viewer([OpenRun(run)]), TOKEN)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={**KEY, "Host": "localhost"})
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == sum(len(one) for one in schema.raw_schema["paths"].values())
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def ask(case: Any) -> None:
            answer = case.call(headers={**KEY, "Host": "localhost"})
            assert answer.status_code < 500, answer.text
            case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])

        ask()


def test_what_is_no_finished_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError):
        OpenRun(tmp_path)
    Run(run).write_json("run.json", {**Run(run).describe(), "stages": {}})
    with pytest.raises(RunError, match="not finished"):
        OpenRun(run)


def test_damaged_samples_are_said(run: Path) -> None:
    (run / "samples.parquet").write_bytes(b"x")
    with pytest.raises(RunError, match=r"samples\.parquet is damaged"):
        OpenRun(run)


def test_a_port_that_is_taken(run: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingError, match="--port"):
            serve([run], port=taken.getsockname()[1], browser=False)


def test_the_page_is_built_of_its_sources() -> None:
    """The script names the digest of all its sources: `cd viewer && npm ci && npm run build` where this fails."""
    root = Path(__file__).parents[1]
    folder = root / "viewer"
    names = ["package-lock.json", "tsconfig.json", "build.mjs", *(f"src/{path.name}" for path in folder.glob("src/*"))]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    built = (root / "src/pfungst/viewer/static/app.js").read_text()
    assert built.startswith(f"/* sources: {digest.hexdigest()} */"), "cd viewer && npm ci && npm run build"


def test_ctrl_c_ends_a_viewer_and_leaves_nothing_undone(finished: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from pfungst import cli;"
        "sys.argv = ['pfungst', 'view', sys.argv[1], '--no-browser']; cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, finished], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Open http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert told.endswith("\nStopped.\n")
