"""Many machines: the relevance stage as tasks of a Ray cluster, one a block, with the same run folder and result.

Every worker opens model and pictures by itself, under the same names, so all machines need the same files (a shared
disk) and the same packages.  One process, the driver, writes; a block that a worker lost is given to another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pfungst.errors import PfungstError, RunError, need
from pfungst.maps import Block, Progress, Subject, map_blocks, open_subject

_TRIES = 4  # how often a block may be lost with its worker before the audit gives up


class Mapper:
    """A worker: the subject opened once, with the first block, since Ray tells no more of what fails before."""

    def __init__(self, source: Any, settings: Any, digest: str, folder: str, threads: int) -> None:
        self.source, self.settings, self.digest, self.folder, self.threads = source, settings, digest, folder, threads
        self.subject: Subject | None = None

    def map(self, rows: np.ndarray) -> Block:
        if self.subject is None:
            self.subject = self._open()
        return next(map_blocks(self.subject, [rows], lambda stage, done, total: None))

    def _open(self) -> Subject:
        torch.set_num_threads(self.threads)
        if os.path.isdir(self.folder):
            os.chdir(self.folder)  # names of files may be relative
        model, images = self.source
        subject = open_subject(model, images, self.settings)
        if fingerprint(subject) != self.digest:
            raise RunError(
                "a worker found another model or other pictures under the same names",
                "put both where every machine of the cluster sees the same files",
            )
        return subject


def fingerprint(subject: Subject) -> str:
    """sha256 (hex) of the model and of the names and labels of the pictures."""
    total = hashlib.sha256(subject.model.digest.encode())
    for name, label in zip(subject.data.ids, subject.data.labels.tolist(), strict=True):
        total.update(f"{name}\0{label}\0".encode())
    return total.hexdigest()


def map_blocks_on_ray(subject: Subject, todo: list[np.ndarray], progress: Progress) -> Iterator[Block]:
    """The blocks as the workers finish them.

    The cluster is that of ``RAY_ADDRESS``, or one is started on this machine.  A worker has one GPU where the device is
    cuda, else as many processors as torch has threads here, so that numbers are those of the local engine bit for bit.
    """
    ray = need("ray", "ray", "--engine ray needs Ray")
    if not todo:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        yield from _dispatch(ray, subject, todo, progress)
    finally:
        if started:
            ray.shutdown()


def _dispatch(ray: Any, subject: Subject, todo: list[np.ndarray], progress: Progress) -> Iterator[Block]:
    cuda, threads = subject.settings.device.startswith("cuda"), torch.get_num_threads()
    have = ray.cluster_resources()
    count = int(have.get("GPU", 0)) if cuda else int(have.get("CPU", 1)) // threads
    needs = {"num_gpus": 1} if cuda else {"num_cpus": min(threads, int(have.get("CPU", 1)))}
    worker = ray.remote(**needs)(Mapper)
    arguments = (ray.put(subject.source), subject.settings, fingerprint(subject), os.getcwd(), threads)
    free = [worker.remote(*arguments) for _ in range(max(1, min(count, len(todo))))]
    waiting, lost = list(todo), dict[int, int]()
    running: dict[Any, tuple[np.ndarray, Any]] = {}
    done = len(subject.data) - sum(map(len, todo))
    while waiting or running:
        while waiting and free:
            rows, one = waiting.pop(0), free.pop()
            running[one.map.remote(rows)] = rows, one
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        rows, one = running.pop(ready)
        try:
            block = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except ray.exceptions.RayActorError as error:  # the worker is gone: another in its place, the block once more
            first = int(rows[0])
            lost[first] = lost.get(first, 0) + 1
            if lost[first] >= _TRIES:
                raise _cause(error) from error
            waiting.insert(0, rows)
            free.append(worker.remote(*arguments))
            continue
        free.append(one)
        done += len(rows)
        progress("relevance", done, len(subject.data))
        yield block


def _cause(error: Exception) -> Exception:
    """The error that a worker met, where it is one of ours; else one that says that workers die."""
    inner = getattr(error, "cause", None) or error
    if isinstance(inner, PfungstError):
        return inner
    first = str(inner).strip().splitlines()[-1] if str(inner).strip() else type(inner).__name__
    return RunError(f"the workers of the Ray cluster fail: {first}", "look into Ray's logs, and try --engine local")
