"""Sets of samples that somebody chose, and views somebody wants to come back to, kept in the run folder.

views.json          {"views": [{name, state, at}], "selections": [{id, name, size, at}]}; a name of "" is nobody's
selections/ID.npy   one bit a sample, the first one lowest (NumPy's packbits, little); ID is made of these bits

A selection without a name is there for links: the latest ``MOST_UNNAMED`` are kept.
"""

from __future__ import annotations

import hashlib
import io
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from pfungst.errors import RunError
from pfungst.store import timestamp
from pfungst.viewer.calls import Refused
from pfungst.viewer.opened import OpenRun

VIEWS = "views.json"
MOST = 100  # views, and selections with a name
MOST_UNNAMED = 50


class Selections:
    """What people kept of one run."""

    def __init__(self, opened: OpenRun) -> None:
        self.opened, self.run = opened, opened.run
        self._lock = threading.Lock()

    def list_kept(self) -> dict[str, Any]:
        """Views by name, and selections that have one."""
        kept = self._read()
        return {
            "views": sorted(kept["views"], key=lambda one: one["name"].casefold()),
            "selections": [one for one in kept["selections"] if one["name"]],
        }

    def keep_view(self, name: str, state: str) -> dict[str, Any]:
        """Keep what is shown under a name; one of this name is replaced."""
        entry = {"name": _check_name(name), "state": _check_text(state, "the view"), "at": timestamp()}
        with self._lock:
            kept = self._read()
            kept["views"] = [one for one in kept["views"] if one["name"] != entry["name"]] + [entry]
            if len(kept["views"]) > MOST:
                raise Refused(409, f"{MOST} views are kept already; delete one")
            self.run.write_json(VIEWS, kept)
        return entry

    def forget_view(self, name: str) -> dict[str, Any]:
        """Delete a view."""
        with self._lock:
            kept = self._read()
            left = [one for one in kept["views"] if one["name"] != name]
            if len(left) == len(kept["views"]):
                raise Refused(404, f"there is no view {name!r}")
            self.run.write_json(VIEWS, {**kept, "views": left})
        return {"deleted": name}

    def keep(self, rows: np.ndarray, name: str) -> dict[str, Any]:
        """Keep these rows, ascending, for links, and under a name if it is not ""; one of this name loses it."""
        name = _check_name(name) if name else ""
        chosen: np.ndarray = np.zeros(self.opened.size, dtype=bool)
        chosen[rows] = True
        bits = np.packbits(chosen, bitorder="little")
        entry = {
            "id": hashlib.sha256(bits.tobytes()).hexdigest()[:12],
            "name": name,
            "size": len(rows),
            "at": timestamp(),
        }
        with self._lock:
            kept = self._read()
            before = next((one for one in kept["selections"] if one["id"] == entry["id"]), None)
            if before is not None and not name:
                entry["name"] = before["name"]
            others = [one for one in kept["selections"] if one["id"] != entry["id"]]
            others = [{**one, "name": ""} if name and one["name"] == name else one for one in others]
            if sum(bool(one["name"]) for one in others) >= MOST and name:
                raise Refused(409, f"{MOST} selections are kept already; delete one")
            if before is None:
                self.run.write_array(f"selections/{entry['id']}.npy", bits)
            self._write({**kept, "selections": [*others, entry]})
        return entry

    def forget(self, key: str) -> dict[str, Any]:
        """Delete a selection."""
        with self._lock:
            kept = self._read()
            self._find(kept, key)
            self._write({**kept, "selections": [one for one in kept["selections"] if one["id"] != key]})
            self._remove(key)
        return {"deleted": key}

    def rows(self, key: str) -> tuple[np.ndarray, str]:
        """The rows of a selection, ascending, and its name.  Raises Refused."""
        entry = self._find(self._read(), key)
        path = self.run.path / "selections" / f"{entry['id']}.npy"
        try:
            bits = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            whole = np.unpackbits(bits, count=self.opened.size, bitorder="little")
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} is damaged: {error}", "choose the samples again") from error
        return np.flatnonzero(whole), entry["name"]

    def _read(self) -> dict[str, Any]:
        content = self.run.read_json(VIEWS)
        if content is None:
            return {"version": 1, "views": [], "selections": []}
        whole = isinstance(content, dict) and all(
            isinstance(content.get(part), list) and all(_whole(one, keys) for one in content[part])
            for part, keys in (("views", ("name", "state", "at")), ("selections", ("id", "name", "at")))
        )
        if not whole:
            raise RunError(f"{self.run.path / VIEWS} is damaged", "move it away; it holds saved views only")
        found: dict[str, Any] = content
        return found

    def _write(self, kept: dict[str, Any]) -> None:
        """Write the list, without the oldest of those that have no name; they come oldest first."""
        unnamed = [one for one in kept["selections"] if not one["name"]]
        gone = {one["id"] for one in unnamed[: max(0, len(unnamed) - MOST_UNNAMED)]}
        left = [one for one in kept["selections"] if one["id"] not in gone]
        self.run.write_json(VIEWS, {**kept, "selections": left})
        for key in gone:
            self._remove(key)

    def _remove(self, key: str) -> None:
        with suppress(OSError):
            (self.run.path / "selections" / f"{key}.npy").unlink()

    @staticmethod
    def _find(kept: dict[str, Any], key: str) -> dict[str, Any]:
        found: dict[str, Any] | None = next((one for one in kept["selections"] if one["id"] == key), None)
        if found is None:
            raise Refused(404, f"there is no selection {key!r}; those without a name are kept for a while only")
        return found


def _whole(entry: Any, keys: tuple[str, ...]) -> bool:
    """Whether an entry of the file is as it was written; an id becomes the name of a file."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        return False
    key = entry.get("id", "0" * 12)
    return len(key) == 12 and set(key) <= set("0123456789abcdef")


def _check_name(name: str) -> str:
    name = _check_text(name, "the name").strip()
    if not 0 < len(name) <= 80:
        raise Refused(422, "a name has 1 to 80 letters")
    return name


def _check_text(text: str, what: str) -> str:
    if not text.isprintable():
        raise Refused(422, f"{what} holds what cannot be printed")
    return text
