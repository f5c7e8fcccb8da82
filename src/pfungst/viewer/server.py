"""``pfungst view``: the page and its calls, on this machine alone.

The page is one HTML file with a script and a style (``static/``, built from ``viewer/`` in the repository).  It asks
the calls below for JSON, pictures, and arrays of samples in binary, and draws them.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pfungst.charts import STYLE, write_colours
from pfungst.errors import SettingError
from pfungst.heatmaps import ONE_SIDED, PALETTES, palette_table
from pfungst.judgements import write_judgement
from pfungst.viewer.access import Guarded, cookie_name
from pfungst.viewer.calls import SAID, Call, Field, Refused, describe_calls
from pfungst.viewer.comparison import Comparison
from pfungst.viewer.laboratory import Asked, Benches
from pfungst.viewer.opened import SIDES, OpenRun
from pfungst.viewer.own import OwnFindings
from pfungst.viewer.planes import Planes

STATIC = files("pfungst.viewer") / "static"
_TYPES = {"app.js": "text/javascript", "app.css": "text/css", "icon.svg": "image/svg+xml"}
_POLLED = 0.5  # seconds between looks at the file of judgements
_BEAT = 15.0  # seconds after which something is sent, so that a closed tab is noticed
RUN = {"run": Field(int, low=0)}
FINDING = {**RUN, "finding": Field(str, high=64)}
SAMPLE = {**RUN, "row": Field(int, low=0)}


class Viewer:
    """The runs that are shown, and what may be asked of them."""

    def __init__(self, runs: Sequence[OpenRun], model: Asked | None = None) -> None:
        """``model``: which one may be loaded to try something; None: none."""
        self.runs = runs
        self.benches = Benches(self.find, model)
        self.own = OwnFindings(self.find, self.benches)
        self.comparison = Comparison(self.find)

    def find(self, run: int) -> OpenRun:
        """The run of this number.  Raises Refused."""
        if run >= len(self.runs):
            raise Refused(404, f"there is no run {run}")
        return self.runs[run]

    def list_runs(self) -> list[dict[str, Any]]:
        """What is shown."""
        return [one.overview() for one in self.runs]

    def list_palettes(self) -> dict[str, Any]:
        """Colours of relevance, each from the negative end to the positive one; one-sided palettes begin at zero."""
        tables = {name: palette_table(name).tolist() for name in PALETTES}
        return {"palettes": tables, "one_sided": list(ONE_SIDED)}

    def list_findings(self, run: int) -> dict[str, Any]:
        """The findings of a run in the report's order, and how many judgements cannot be read."""
        return {"findings": self.find(run).findings(), "torn": self.find(run).torn()}

    def show_finding(self, run: int, finding: str) -> dict[str, Any]:
        """All of one finding."""
        return self.find(run).finding(finding)

    def send_picture(self, run: int, finding: str, name: str) -> Response:
        """A picture of a finding."""
        return Response(self.find(run).find_picture(finding, name).read_bytes(), media_type="image/png")

    def judge(self, run: int, finding: str, answer: str, note: str) -> dict[str, Any]:
        """Write down what a person says of a finding; its entry as it is now."""
        opened = self.find(run)
        write_judgement(opened.run, finding, answer, note=note)
        (now,) = (one for one in opened.findings() if one["id"] == finding)
        return now

    def list_classes(self, run: int) -> list[dict[str, Any]]:
        """The analysed classes."""
        return self.find(run).classes()

    def show_sample(self, run: int, row: int) -> dict[str, Any]:
        """What is known of a sample."""
        return self.find(run).sample(row)

    def send_sample(self, run: int, row: int, side: int, part: str) -> Response:
        """A sample's picture."""
        size = next((one for one in SIDES if one >= side), SIDES[-1])
        content = self.find(run).picture(row, size, part == "input")
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def send_relevance(self, run: int, row: int) -> Response:
        """A sample's map: little-endian float32, height and width in the headers."""
        values = self.find(run).relevance(row)
        shape = {"X-Height": str(values.shape[0]), "X-Width": str(values.shape[1])}
        return Response(values.astype("<f4").tobytes(), media_type="application/octet-stream", headers=shape)

    def calls(self) -> list[Call]:
        """The table of calls."""
        here = "/api/runs/{run:int}"
        of_finding = here + "/findings/{finding}"
        of_sample = here + "/samples/{row:int}"
        asked = {"side": Field(int, 224, low=1, high=4096), "part": Field(str, "whole", choices=("whole", "input"))}
        named = {**FINDING, "name": Field(str, high=64)}
        binary = "application/octet-stream"
        return [
            Call("GET", "/api/runs", "The runs that are shown", self.list_runs),
            Call("GET", "/api/palettes", "Colours of relevance", self.list_palettes),
            Call("GET", here + "/findings", "Findings of a run", self.list_findings, RUN),
            Call("GET", of_finding, "One finding", self.show_finding, FINDING),
            Call("GET", of_finding + "/pictures/{name}", "A picture of a finding", self.send_picture, named,
                 returns="image/png"),
            Call("POST", of_finding + "/judgements", "Say what a finding is", self.judge, FINDING, body=SAID),
            Call("GET", here + "/classes", "Analysed classes", self.list_classes, RUN),
            Call("GET", of_sample, "One sample", self.show_sample, SAMPLE),
            Call("GET", of_sample + "/picture", "A sample's picture", self.send_sample, SAMPLE, asked,
                 returns="image/jpeg"),
            Call("GET", of_sample + "/relevance", "A sample's map", self.send_relevance, SAMPLE, returns=binary),
        ]  # fmt: skip


def make_app(viewer: Viewer, token: str) -> Starlette:
    """The application, guarded by ``token``."""
    parts = (viewer, viewer.benches, viewer.own, viewer.comparison, Planes(viewer))
    calls = [call for part in parts for call in part.calls()]
    description = describe_calls(calls, _version())

    async def show_page(request: Request) -> Response:
        page = Response((STATIC / "index.html").read_bytes(), media_type="text/html")
        page.set_cookie(cookie_name(token), token, httponly=True, samesite="strict", path="/")
        return page

    async def send_static(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "charts.css":
            return Response(_write_style(), media_type="text/css")
        if name not in _TYPES:
            return JSONResponse({"error": f"there is no {name}"}, 404)
        return Response((STATIC / name).read_bytes(), media_type=_TYPES[name])

    async def describe(request: Request) -> Response:
        return JSONResponse(description)

    async def tell_changes(request: Request) -> Response:
        run = request.path_params["run"]
        if run >= len(viewer.runs):
            return JSONResponse({"error": f"there is no run {run}"}, 404)
        return StreamingResponse(watch(viewer.runs[run].version), media_type="text/event-stream")

    routes = [
        Route("/", show_page),
        Route("/static/{name}", send_static),
        Route("/api/openapi.json", describe),
        Route("/api/runs/{run:int}/changes", tell_changes),
        *(call.route() for call in calls),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guarded, token=token)])


def _write_style() -> str:
    """Colours of charts and verdicts, and how charts look, which the report has too, as a style sheet."""
    light, dark = (f":root {{ {write_colours(ground)} }}" for ground in ("light", "dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{STYLE}\n"


async def watch(look: Callable[[], str]) -> AsyncIterator[str]:
    """Server-sent events: what ``look`` says now, and again whenever it says something else."""
    known, silent = "", 0.0
    while True:
        now = await asyncio.to_thread(look)
        if now != known or silent >= _BEAT:
            yield f"data: {now}\n\n" if now != known else ": \n\n"
            known, silent = now, 0.0
        await asyncio.sleep(_POLLED)
        silent += _POLLED


def serve(
    runs: Sequence[str | Path],
    *,
    port: int = 0,
    images: str | Path | None = None,
    model: Asked | None = None,
    browser: bool = True,
    tell: Callable[[str], None] = print,
) -> None:
    """Show finished runs until it is interrupted (Ctrl-C).

    port     on 127.0.0.1; 0: any that is free
    images   where the pictures are now, if they were moved
    model    which model may be loaded to try something; none by default
    browser  open the page
    tell     is called with the address, once it can be opened

    Raises RunError for what is no finished run, SettingError where the port is taken.
    """
    import uvicorn

    viewer = Viewer([OpenRun(path, images) for path in runs], model)
    token = secrets.token_urlsafe(24)
    listening = _listen(port)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            tell(address)
            if browser:
                import webbrowser

                webbrowser.open(address)

    config = uvicorn.Config(make_app(viewer, token), log_level="warning", access_log=False, server_header=False,
                            timeout_graceful_shutdown=1)  # fmt: skip
    with listening:
        Server(config).run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise SettingError(
            f"port {port} cannot be used: {error}", "give --port another one, or leave it out"
        ) from error
    return listening


def _version() -> str:
    try:
        return version("pfungst")
    except PackageNotFoundError:
        return "unknown"
