"""Pictures read ahead of the model that works on those before: by threads, or by processes where a GPU would wait.

Threads share one interpreter with the thread that feeds the GPU, and take it away from it: on an H100, ResNet-50 got a
third of the pictures that it could have explained (benchmarks/keep_busy.py).  Processes hand over pixels as bytes
through pipes, a quarter of what inputs are, and need no shared memory, of which containers have little.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pfungst.domains.image import ImageData, read_pixels
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import RunError
from pfungst.processes import end_with
from pfungst.properties import measure_file

_AHEAD = 3  # batches that are read, or being read, before they are asked for
_THREADS = 2  # one measures files while the other decodes pictures
_PART = 16  # pictures that a process reads before it hands them over
_FEW = 4  # batches up to which it is not worth starting processes


@dataclass(frozen=True)
class Batch:
    """Pictures read from disk.

    rows     what was asked for
    pixels   of those that could be read, as ``Preprocess.to_array`` gives them
    ok       their rows
    bad      of the other rows, why not
    files    ``measure_file`` of each that could be read
    """

    rows: np.ndarray
    pixels: np.ndarray
    ok: list[int]
    bad: dict[int, str]
    files: list[tuple[list[float], str]]


def read_ahead(
    data: ImageData, preprocess: Preprocess, batches: Sequence[np.ndarray], workers: int, device: str
) -> Iterator[Batch]:
    """The batches in their order.  ``workers``: threads or processes; 0: one thread."""
    if uses_processes(len(batches), workers, device):
        return _by_processes(data, preprocess, batches, workers)
    return _by_threads(data, preprocess, batches, workers)


def uses_processes(batches: int, workers: int, device: str) -> bool:
    """Whether a GPU waits for many pictures, and processes can be started that know all that this one does."""
    forks = "fork" in multiprocessing.get_all_start_methods()
    return device.startswith("cuda") and workers > 1 and batches > _FEW and forks


def _read(data: ImageData, preprocess: Preprocess, rows: np.ndarray, workers: int) -> Batch:
    pixels, ok, bad = read_pixels(data, rows.tolist(), preprocess, workers)
    return Batch(rows, pixels, ok, bad, [measure_file(data.paths[row]) for row in ok])


def _by_threads(
    data: ImageData, preprocess: Preprocess, batches: Sequence[np.ndarray], workers: int
) -> Iterator[Batch]:
    def read(rows: np.ndarray) -> Batch:
        return _read(data, preprocess, rows, workers)

    return _keep_ahead(read, batches, _THREADS)


def _keep_ahead(get: Callable[[Any], Batch], batches: Sequence[Any], threads: int) -> Iterator[Batch]:
    with ThreadPoolExecutor(threads) as pool:
        coming = deque(pool.submit(get, one) for one in batches[:_AHEAD])
        for one in batches[_AHEAD:]:
            coming.append(pool.submit(get, one))
            yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class _Parts(Dataset[Batch]):
    """Parts of batches, by number: what a process reads."""

    def __init__(self, data: ImageData, preprocess: Preprocess, parts: list[np.ndarray]) -> None:
        self.data, self.preprocess, self.parts = data, preprocess, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch:
        return _read(self.data, self.preprocess, self.parts[number], 0)


def _by_processes(
    data: ImageData, preprocess: Preprocess, batches: Sequence[np.ndarray], workers: int
) -> Iterator[Batch]:
    cut = [np.split(rows, range(_PART, len(rows), _PART)) for rows in batches]
    parts = _Parts(data, preprocess, [part for several in cut for part in several])
    loader = DataLoader(
        parts,
        batch_size=None,
        num_workers=min(workers, len(parts)),
        worker_init_fn=functools.partial(end_with, os.getpid()),
        collate_fn=_as_it_is,  # arrays stay arrays: tensors would go through shared memory
        multiprocessing_context="fork",  # a model's own preprocessing need not be one that can be pickled
    )
    coming = _each(loader)

    def take(one: tuple[np.ndarray, int]) -> Batch:
        rows, count = one
        try:
            return _join(rows, [next(coming) for _ in range(count)])
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise RunError(
                f"a process that reads pictures died ({str(error).splitlines()[0]})",
                "run again, it goes on where it stopped; with fewer --workers if memory is short",
            ) from error

    # One thread takes over what they read, while the other feeds the GPU.
    return _keep_ahead(take, [(rows, len(several)) for rows, several in zip(batches, cut, strict=True)], 1)


def _each(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Its parts.  The processes start with the first, in the thread that asks for it: were it the main thread, torch
    would raise the death of one there, whatever that thread is doing."""
    yield from loader


def _as_it_is(part: Any) -> Any:
    return part


def _join(rows: np.ndarray, parts: list[Batch]) -> Batch:
    bad = {row: why for part in parts for row, why in part.bad.items()}
    ok = [row for part in parts for row in part.ok]
    return Batch(rows, np.concatenate([part.pixels for part in parts]), ok, bad, [f for p in parts for f in p.files])
