"""What is done of a long job on one thing, on disk, so that the job goes on there after it was killed.

A state is written whole or not at all, and only every few seconds; an array that goes with it is written first, under a
name of its own, so that a state never speaks of an array that is not there.  Without a folder nothing is kept.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pfungst.errors import RunError
from pfungst.store import Run, writing

_EVERY = 5.0  # seconds between two states


class Journal:
    """States by stage.  ``identity``: what must be the same for the job to be gone on with; else it begins anew."""

    def __init__(self, folder: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self._run = None if folder is None else Run(folder)
        self._stages: dict[str, dict[str, Any]] = {}
        self._identity = {} if identity is None else dict(identity)
        self._last = time.monotonic()
        if self._run is not None:
            try:
                state = self._run.read_json("state.json")
            except RunError:  # torn by a disk that lost power
                state = None
            if state and state["identity"] == self._identity:
                self._stages = state["stages"]
            else:
                shutil.rmtree(self._run.path, ignore_errors=True)

    def read(self, stage: str) -> tuple[dict[str, Any], np.ndarray | None]:
        """The last state of a stage and its array; empty where there is none."""
        content = self._stages.get(stage, {})
        if self._run is None or not content.get("array"):
            return content, None
        return content, np.load(self._run.path / content["array"], allow_pickle=False)

    def write(self, stage: str, content: dict[str, Any], array: np.ndarray | None = None, last: bool = False) -> None:
        """Keep a state, with an array: if some seconds have passed, or it is the ``last`` of its stage."""
        if self._run is None or (not last and time.monotonic() - self._last < _EVERY):
            return
        before = self._stages.get(stage, {}).get("array")
        name = None
        if array is not None:
            name = f"{stage}_{'b' if before == f'{stage}_a.npy' else 'a'}.npy"
            self._run.write_array(name, array)
        self._stages[stage] = {**content, "array": name}
        self._run.write_json("state.json", {"identity": self._identity, "stages": self._stages})
        self._last = time.monotonic()

    def open_array(self, name: str, shape: tuple[int, ...], go_on: bool) -> np.ndarray:
        """A float32 array of zeros, on disk if there is a folder; with ``go_on`` the one that is there."""
        if self._run is None:
            return np.zeros(shape, np.float32)
        path = self._run.path / f"{name}.npy"
        with writing(self._run.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if go_on:
                return np.lib.format.open_memmap(path, mode="r+")
            return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
