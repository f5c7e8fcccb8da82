"""Long work that the page asked for: one job at a time, in a thread, and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pfungst.errors import PfungstError
from pfungst.viewer.calls import Refused

Key = tuple[int, str]  # number of the run, and what of it


class Stopped(Exception):
    """Nobody waits for this any more."""


@dataclass
class Job:
    """Work that was begun.  ``over``: it has come to its end, with a ``failure`` or without."""

    key: Key
    step: str = ""
    done: int = 0
    total: int = 1
    began: float = field(default_factory=time.monotonic)
    failure: str = ""
    stopping: bool = False
    over: bool = False

    def seconds_left(self) -> float | None:
        """At this pace; None before there is one."""
        passed = time.monotonic() - self.began
        return passed * (self.total - self.done) / self.done if self.done else None


class Desk:
    """Where jobs are done: one at a time for all runs, so that the machine stays usable.

    ``busy``: what is said while a job is being done and another one is asked for.
    """

    def __init__(self, busy: Callable[[Job], str]) -> None:
        self._busy = busy
        self._lock = threading.Lock()
        self._job: Job | None = None

    def start(self, job: Job, work: Callable[[Job], None], share: bool = False) -> Job:
        """Begin.  Raises Refused while another job is being done; with ``share``, one of the same key is returned."""
        with self._lock:
            known = self._job
            if known is not None and not known.over:
                if share and known.key == job.key:
                    return known
                raise Refused(409, self._busy(known))
            self._job = job
        threading.Thread(target=self._do, args=(job, work), daemon=True).start()
        return job

    @property
    def last(self) -> Job | None:
        """The job that was begun last, over or not."""
        with self._lock:
            return self._job

    def _do(self, job: Job, work: Callable[[Job], None]) -> None:
        try:
            work(job)
        except Stopped:
            job.failure = "stopped"
        except (PfungstError, Refused) as error:
            job.failure = str(error)
        except Exception as error:  # whatever a library, or a model's own code, raises; the page has to say it
            job.failure = f"{type(error).__name__}: {error}"
        finally:
            job.over = True
