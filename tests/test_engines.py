"""Relevance by the processes of a Ray cluster: the same bytes as by this process, though a worker is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import pfungst
from pfungst.errors import MissingExtra, RunError


def workers() -> list[int]:
    """Processes of Ray that hold a subject."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::Mapper"):
                found.append(int(entry.parent.name))
        except OSError:  # it is gone
            continue
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks instead of one."""
    for module in ("maps", "store"):
        monkeypatch.setattr(f"pfungst.{module}.BLOCK", 8)


def arrays(run: Path) -> dict[str, bytes]:
    return {name: np.asarray(a[:]).tobytes() for name, a in zarr.open_group(run / "pooled.zarr", mode="r").arrays()}


def test_a_lost_worker_loses_nothing(cluster: Any, small: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "relevance" and 0 < done < total and not killed:
            killed.extend(workers()[:1])
            os.kill(killed[0], signal.SIGKILL)

    settings = {**small.settings, "batch_size": 4}
    on_ray = pfungst.audit(small.model, small.photos, out=tmp_path / "ray", engine="ray", progress=progress, **settings)
    here = pfungst.audit(small.model, small.photos, out=tmp_path / "here", **settings)
    assert killed
    assert arrays(on_ray.run.path) == arrays(here.run.path)
    names = ("findings.json", "samples.parquet")
    assert all((on_ray.run.path / n).read_bytes() == (here.run.path / n).read_bytes() for n in names)
    # The engine is no part of what makes an audit the same: the finished run is opened, nothing is done again.
    pfungst.audit(small.model, small.photos, out=tmp_path / "ray", **settings)


def test_errors_of_workers_are_ours(cluster: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfungst.engines.fingerprint", lambda subject: "0" * 64)  # in this process, not in workers
    with pytest.raises(RunError, match="another model or other pictures under the same names"):
        pfungst.audit(small.model, small.photos, out=tmp_path / "run", engine="ray", **small.settings)


def test_without_ray(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pfungst\[ray\]'"):
        pfungst.audit(small.model, small.photos, out=tmp_path / "run", engine="ray", **small.settings)
