"""The errors that pfungst raises on purpose: each says the cause and the remedy.

The command line prints them as one message without a traceback; everything else is a defect of ours.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class PfungstError(Exception):
    """Something the user can mend.  ``str(error)`` is the cause, ``error.remedy`` what to do about it."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.remedy = remedy

    def __str__(self) -> str:
        cause = super().__str__()
        return f"{cause}\n  Remedy: {self.remedy}" if self.remedy else cause


class PfungstWarning(UserWarning):
    """Something that does not stop the work, and that the user should look at."""


class SettingError(PfungstError):
    """A setting, flag or argument is out of its range, or two of them do not go together."""


class ModelError(PfungstError):
    """The model cannot be loaded, or does not compute what an audit needs (tuple, NaN, wrong shape)."""


class DataError(PfungstError):
    """The images, labels or the manifest cannot be used."""


class RelevanceError(PfungstError):
    """Relevance cannot be computed for this model as it is."""


class UnknownFunction(RelevanceError):
    """The model calls a torch function for which there is no relevance rule."""


class RunError(PfungstError):
    """The run folder cannot be written, or belongs to another model, other data or other settings."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class MissingExtra(PfungstError):
    """An optional library is not installed; the remedy names the ``pip install``."""


def need(module: str, extra: str, cause: str) -> Any:
    """An optional library, imported now.  Raises MissingExtra with this cause where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(cause, f"pip install 'pfungst[{extra}]'") from error
