"""Findings of a person's own in the viewer: kept, listed, deleted, and tested by a job that tells how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from pfungst.charts import draw_effects
from pfungst.errors import RunError
from pfungst.evidence import DECIDE
from pfungst.facts import list_again, list_experiment
from pfungst.judgements import add_judgements, write_judgement
from pfungst.own_findings import STEPS, confirm_own
from pfungst.own_groups import FOLDER, as_finding, delete_own, list_own, read_own, write_own
from pfungst.viewer.calls import SAID, Call, Field, Refused
from pfungst.viewer.jobs import Desk, Job
from pfungst.viewer.laboratory import Benches
from pfungst.viewer.opened import PICTURES, OpenRun, is_own_file

LOADING = "the model is loaded"


class OwnFindings:
    """The calls; one test at a time in all runs together."""

    def __init__(self, find: Callable[[int], OpenRun], benches: Benches) -> None:
        self.find, self.benches = find, benches
        self._guard = threading.Lock()
        self._desk = Desk(lambda job: f"{job.key[1]} is being tested; one at a time")

    def list_all(self, run: int) -> dict[str, Any]:
        """All of a run, and the job if it is of this run."""
        opened = self.find(run)
        job = self._desk.last
        return {
            "own": [_tell(opened, record) for record in list_own(opened.run)],
            "job": _tell_job(job) if job is not None and job.key[0] == run else None,
        }

    def create(self, run: int, name: str, rows: list[int], note: str, **more: Any) -> dict[str, Any]:
        """Keep a group."""
        opened = self.find(run)
        with self._guard:  # two at once must not both find the name free
            return _tell(opened, write_own(opened.run, name, rows, more["class"], note))

    def show(self, run: int, name: str) -> dict[str, Any]:
        """One of them."""
        opened = self.find(run)
        return _tell(opened, read_own(opened.run, name))

    def delete(self, run: int, name: str) -> dict[str, Any]:
        """Delete one."""
        with self._guard:
            job = self._desk.last
            if job is not None and not job.over and job.key == (run, name):
                raise Refused(409, f"{name} is being tested")
            delete_own(self.find(run).run, name)
        return self.list_all(run)

    def confirm(self, run: int, name: str) -> dict[str, Any]:
        """Begin to test one; ``list_all`` tells how far it is."""
        opened, bench = self.find(run), self.benches.bench(run)
        read_own(opened.run, name)
        bench.start()

        def work(job: Job) -> None:
            def tell(step: str, done: int, total: int) -> None:
                job.step, job.done, job.total = step, done, total

            with bench.model(f"{name} is tested", patience=600) as subject:
                confirm_own(opened.run, subject, name, tell)

        return _tell_job(self._desk.start(Job((run, name), LOADING, 0, len(STEPS)), work))

    def judge(self, run: int, name: str, answer: str, note: str) -> dict[str, Any]:
        """Write down what somebody says one is."""
        opened = self.find(run)
        read_own(opened.run, name)
        write_judgement(opened.run, name, answer, note=note)
        return self.show(run, name)

    def send_picture(self, run: int, name: str, picture: str) -> Response:
        """A picture of a tested one."""
        opened = self.find(run)
        record = read_own(opened.run, name)
        path = opened.run.path / FOLDER / record["name"] / f"{picture}.png"
        if picture not in PICTURES or not is_own_file(path):
            raise RunError(f"{name} has no picture {picture!r}", "it has some when it was tested")
        return Response(path.read_bytes(), media_type="image/png")

    def calls(self) -> list[Call]:
        """The table of calls."""
        run = {"run": Field(int, low=0)}
        named = {**run, "name": Field(str, low=1, high=64)}
        pictured = {**named, "picture": Field(str, high=64)}
        made = {
            "name": Field(str, low=1, high=64),
            "rows": Field(list, low=1, high=1_000_000, items=int),
            "class": Field(str, "", high=1000),
            "note": Field(str, "", high=10_000),
        }
        here = "/api/runs/{run:int}/own"
        one = here + "/{name}"
        return [
            Call("GET", here, "Findings of one's own", self.list_all, run),
            Call("POST", here, "Keep a group as a finding of one's own", self.create, run, body=made),
            Call("GET", one, "One of them", self.show, named),
            Call("DELETE", one, "Delete one", self.delete, named),
            Call("POST", one + "/judgements", "Say what one is", self.judge, named, body=SAID),
            Call("POST", one + "/confirm", "Test one by experiment", self.confirm, named),
            Call("GET", one + "/pictures/{picture}", "A picture of one that was tested", self.send_picture, pictured,
                 returns="image/png"),
        ]  # fmt: skip


def _tell_job(job: Job) -> dict[str, Any]:
    run, name = job.key
    told = {"step": job.step, "done": job.done, "total": job.total, "failure": job.failure}
    return {"run": run, "name": name, "running": not job.over, **told}


def _tell(opened: OpenRun, record: dict[str, Any]) -> dict[str, Any]:
    """A record as the page wants it: rows instead of ids, the chart of a test, and what its pictures show."""
    told = {key: value for key, value in record.items() if key != "samples"}
    (finding,) = add_judgements(opened.run, [as_finding(record)])
    told |= {"judgements": finding["judgements"], "again": list_again(opened.run, finding)}
    if told["result"] is not None:
        told["result"] = {**told["result"], "chart": draw_effects(told["result"]["evidence"], DECIDE)}
        kind = told["result"]["where"]["kind"]
        told["experiment"] = list_experiment(opened.run, f"{FOLDER}/{record['name']}", kind)
    return told
