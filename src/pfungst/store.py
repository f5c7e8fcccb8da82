"""The run folder: settings, digests, arrays and tables of one audit, in open formats, resumable.

Every file is written beside its place and renamed, so a reader or a killed process never sees half of one.  A stage
that is done is recorded in ``run.json`` and never done again; a folder of another model, other data or other settings
is refused with the difference named.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pfungst.errors import RunError

VERSION = 1
JUDGEMENTS = "judgements.jsonl"  # what people said; may be there before its run, see judgements.py
NOT_READ, READ = 0, 1  # of the array "status"
BLOCK = 256  # samples a chunk: the unit that is done or not done

# What the arrays mean, written beside each; a name may go on with the layer: "what:layer3.0.conv1".
ARRAYS = {
    "where": "relevance of the input, summed over channels and pooled by area to a grid (sums and signs kept)",
    "what": "relevance at the output of the named layer, by channel, summed over places",
    "strongest": "relevance at the output of the named layer, by channel, its greatest value over places",
    "relevance": "relevance of the input, summed over channels, one value a pixel of the model's input",
    "properties": "brightness, tint, blur ... of the picture as the model gets it (samples.parquet names them)",
    "file": "width, height, compression ... of the picture's file (samples.parquet names them), nan where unknown",
    "explained": "the output (logit) that is explained: target",
    "absorbed": "part of the output that biases and stabilisers took: explained = sum of relevance + absorbed",
    "target": "index of the explained class",
    "prediction": "index of the greatest output",
    "probability": "softmax of the greatest output",
    "target_probability": "softmax of the explained output",
    "status": "1: read and explained, 0: could not be read, or the model returned NaN or infinity",
}


class Run:
    """One run folder.  ``identity`` is what must be the same for the folder to be gone on with."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # ---- identity and stages

    def begin(self, identity: Mapping[str, Any], **notes: Any) -> None:
        """Create the folder, or make sure that it belongs to this model, data and settings.

        ``notes``: what is written down beside when the folder is made, and not compared.
        """
        identity = json.loads(json.dumps(identity))  # tuples become lists, as they come back from the file
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._begun():
                self.write_json("run.json", {"version": VERSION, **identity, **notes, "stages": {}})
                return
        known = self.describe()
        if known.get("version") != VERSION:
            raise RunError(
                f"{self.path} was written in format {known.get('version')}, this is format {VERSION}",
                "give --out another folder",
            )
        differences = list(list_differences(known, identity))
        if differences:
            raise RunError(
                f"{self.path} belongs to another audit: " + "; ".join(differences[:4]),
                "give --out another folder, or the settings that this run began with",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process may work on a run; the lock dies with the process, however it ends.

        Folders that were made for it, and hold nothing when an error ends the work, are removed again.
        """
        import fcntl

        with writing(self.path):
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._begun()  # before the lock: not even that goes into somebody else's folder
            handle = (self.path / ".lock").open("a")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process works on {self.path}", "wait for it, or give another folder") from None
            try:
                yield
            except BaseException:
                if made and [file.name for file in self.path.iterdir()] == [".lock"]:
                    (self.path / ".lock").unlink()
                    for folder in made:
                        with suppress(OSError):  # somebody else uses it by now
                            folder.rmdir()
                raise

    def _begun(self) -> bool:
        """Whether the folder holds a run; an error if it holds anything else."""
        if (self.path / "run.json").exists():
            return True
        if any(not file.name.startswith(".") and file.name != JUDGEMENTS for file in self.path.iterdir()):
            raise RunError(f"{self.path} is not empty and no run of pfungst", "give --out another folder")
        return False

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a finished stage noted down, or None if it is not done."""
        notes: dict[str, Any] | None = self.describe()["stages"].get(name)
        return notes

    def finish(self, name: str, **notes: Any) -> None:
        """Record that a stage is done."""
        description = self.describe()
        description["stages"][name] = notes
        self.write_json("run.json", description)

    def check_finished(self) -> None:
        """Raises RunError where the last stage is not done."""
        if self.stage("samples") is None:
            raise self._unfinished()

    def read_findings(self) -> dict[str, Any]:
        """The content of ``findings.json``.  Raises RunError where there is none yet."""
        content: dict[str, Any] | None = self.read_json("findings.json")
        if content is None:
            raise self._unfinished()
        return content

    def _unfinished(self) -> RunError:
        return RunError(f"{self.path} is not finished", "give the `pfungst audit` command again; it goes on")

    def describe(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        description = self.read_json("run.json")
        if description is None:
            raise RunError(f"{self.path} is no run folder", "give the folder that `pfungst audit --out` wrote")
        if not isinstance(description, dict) or not isinstance(description.get("stages"), dict):
            raise RunError(f"{self.path / 'run.json'} is damaged, or not of pfungst", "give --out another folder")
        return description

    # ---- files

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, None if there is none."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path / name} is damaged: {error}", "give --out another folder") from None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        self._write(name, lambda handle: handle.write(content))

    def write_array(self, name: str, values: np.ndarray) -> None:
        """Write an array as .npy, whole or not at all; one that lies on disk is not read into memory."""
        self._write(name, lambda handle: np.save(handle, values))

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        target = self.path / name
        beside = target.with_name(f".{target.name}.part")
        with writing(self.path):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as handle:
                    write(handle)
                    handle.flush()
                    os.fsync(handle.fileno())
                beside.replace(target)
            except OSError:
                beside.unlink(missing_ok=True)  # on a full disk it is in the way
                raise

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write a Parquet table from named columns of equal length."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(columns)), buffer)
        self.write_bytes(name, buffer.getvalue().to_pybytes())

    # ---- arrays of all samples

    def create_arrays(self, count: int, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Make one array a name, (shape of one sample, dtype); existing ones are kept.  Chunks carry a checksum."""
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        with writing(self.path):
            for name, (shape, dtype) in shapes.items():
                group = zarr.open_group(self.path / _home(name), mode="a")
                if name not in group:
                    codecs = [ZstdCodec(level=3), Crc32cCodec()]
                    chunks = (BLOCK, *shape)
                    meaning = {"meaning": ARRAYS[name.partition(":")[0]]}
                    group.create_array(
                        name,
                        shape=(count, *shape),
                        chunks=chunks,
                        dtype=dtype,
                        compressors=codecs,
                        attributes=meaning,
                    )

    def write_block(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the samples of one block and only then record it as done."""
        import zarr

        # A chunk of zeros is written too, so that a missing one is known to be lost.
        with writing(self.path), zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in arrays.items():
                array: Any = zarr.open_group(self.path / _home(name), mode="r+")[name]
                array[block * BLOCK : block * BLOCK + len(values)] = values
        done = self.blocks_done()
        self.write_json("blocks.json", sorted({*done, block}))

    def blocks_done(self) -> list[int]:
        """Blocks that are complete."""
        return self.read_json("blocks.json") or []

    def read_array(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Some rows of an array (all of them by default)."""
        array = self._open(name)
        count = array.shape[0] if rows is None else len(rows)
        result: np.ndarray = np.empty((count, *array.shape[1:]), array.dtype)
        for places, values in self.stream_arrays([name], rows):
            result[places] = values[name]
        return result

    def stream_arrays(
        self, names: Sequence[str], rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Some rows of several arrays (all of them by default) block by block: no more than one block is held.

        Yields places in ``rows`` and the values there, by name.  Each block is read once, whatever the order of rows.
        """
        arrays = {name: self._open(name) for name in names}
        rows = np.arange(next(iter(arrays.values())).shape[0]) if rows is None else np.asarray(rows)
        order = np.argsort(rows, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(rows[order] // BLOCK)) + 1) if len(rows) else ():
            block = int(rows[places[0]]) // BLOCK
            values = {}
            for name, array in arrays.items():
                try:
                    if not self._chunk(name, array, block).exists():  # zarr would give zeros
                        raise RuntimeError(f"the chunk of samples {block * BLOCK} to {(block + 1) * BLOCK} is missing")
                    whole = np.asarray(array[block * BLOCK : (block + 1) * BLOCK])
                except (ValueError, RuntimeError, OSError) as error:
                    raise RunError(
                        f"{self.path / _home(name)}/{name} is damaged: {error}",
                        "give the same `pfungst audit` command again: it computes these samples anew",
                    ) from None
                values[name] = whole[rows[places] - block * BLOCK]
            yield places, values

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, all samples first."""
        shape: tuple[int, ...] = self._open(name).shape
        return shape

    def _open(self, name: str) -> Any:
        import zarr

        try:
            return zarr.open_group(self.path / _home(name), mode="r")[name]
        except (KeyError, FileNotFoundError):
            raise RunError(f"{self.path} holds no {name!r}", "give --out another folder") from None
        except (ValueError, RuntimeError, OSError) as error:
            raise RunError(
                f"{self.path / _home(name)}/{name} is damaged: {error}", "give --out another folder"
            ) from None

    def _chunk(self, name: str, array: Any, block: int) -> Path:
        """The file of one block of an array."""
        key: str = array.metadata.encode_chunk_key((block, *(0,) * (array.ndim - 1)))
        return self.path / _home(name) / name / key

    def find_damage(self) -> list[int]:
        """Blocks that count as done and have a chunk that is missing or does not fit its checksum.

        Files are read and not decompressed: about 50 µs a chunk.
        """
        arrays = self._arrays()
        return [b for b in self.blocks_done() if not all(_intact(self._chunk(n, a, b)) for n, a in arrays.items())]

    def forget_blocks(self, blocks: Sequence[int]) -> None:
        """Let these blocks count as not done, and with them the stage ``relevance``; later stages stay done."""
        with writing(self.path):
            description = self.describe()
            description["stages"].pop("relevance", None)
            self.write_json("run.json", description)
            for name, array in self._arrays().items():
                for block in blocks:
                    self._chunk(name, array, block).unlink(missing_ok=True)
            self.write_json("blocks.json", sorted(set(self.blocks_done()) - set(blocks)))

    def _arrays(self) -> dict[str, Any]:
        """All arrays whose description can be read; the others are an error when they are needed."""
        import zarr

        found: dict[str, Any] = {}
        for store in sorted({_home(name) for name in ARRAYS}):
            with suppress(FileNotFoundError, ValueError, KeyError, RuntimeError):
                found |= dict(zarr.open_group(self.path / store, mode="r").arrays())
        return found

    def read_view(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of a view, each as one vector, (rows, d) float64."""
        return self.read_array(name, rows).reshape(len(rows), -1).astype(np.float64)


def run_of(source: Any) -> Run:
    """The run that is meant: itself, of the path of its folder, or of what has one (an ``Audit``)."""
    if isinstance(source, str | Path):
        return Run(source)
    found: Run = source if isinstance(source, Run) else source.run
    return found


def timestamp() -> str:
    """Now, in UTC, to the second (ISO 8601), as records of a run have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _home(name: str) -> str:
    """Whole maps are large and kept only on request, so they have a store of their own."""
    return "relevance.zarr" if name == "relevance" else "pooled.zarr"


def _intact(chunk: Path) -> bool:
    """Whether a chunk is there and fits its checksum, its last four bytes (Crc32cCodec is the last codec)."""
    import google_crc32c

    try:
        content = chunk.read_bytes()
    except OSError:
        return False
    return len(content) > 4 and google_crc32c.value(content[:-4]).to_bytes(4, "little") == content[-4:]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write into errors that say what to do."""
    try:
        yield
    except PermissionError as error:
        raise RunError(f"no permission to write {error.filename or path}", "give --out a folder of your own") from None
    except (NotADirectoryError, FileExistsError):
        file = next((place for place in (path, *path.parents) if place.is_file()), path)
        raise RunError(f"{file} is a file, not a folder", "give --out a folder") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RunError(
            f"cannot write to {path}: {error.strerror or error}",
            "free some space and give the same command again: what is finished is kept"
            if full
            else "give the same command again (what is finished is kept), or --out another folder",
        ) from None


def list_differences(known: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """What is another value in ``now`` than in ``known``, both as JSON has them, with both values, in words."""
    for key, value in now.items():
        before = known.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from list_differences(before, value, f"{at}{key}.")
        elif value != before:
            was, is_now = _parting(repr(before), repr(value))
            yield f"{at}{key} was {was}, is now {is_now}"


def _parting(one: str, other: str, most: int = 40) -> tuple[str, str]:
    """Two texts that differ; long ones cut to ``most`` characters, from a little before they do."""
    ends = min(len(one), len(other))
    same = next((i for i in range(ends) if one[i] != other[i]), ends)
    first = max(0, same - most // 2)
    return _cut(one, first, most), _cut(other, first, most)


def _cut(text: str, first: int, most: int) -> str:
    if len(text) <= most:
        return text
    part = text[first : first + most]
    return f"{'...' * (first > 0)}{part}{'...' * (first + most < len(text))}"


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON knows them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
