"""Processes that work for this one: they end when it does, however it ends."""

from __future__ import annotations

import os
import threading
import time


def end_with(parent: int, _: int = 0) -> None:
    """Let this process end when its parent is killed; else it would wait for ever for somebody to take its results.

    To be called first in the process; ``parent``: the other's number.  What else is given (torch's readers get a number
    each) does not matter.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
