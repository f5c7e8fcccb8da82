"""Relevance maps that another program made, read from its file in pieces, in the order of an audit's pictures.

.npy, .npz         an array; in an .npz "ids" beside it names the pictures
.h5, .hdf5         as CoRelAy and ViRelAy have it: "attribution" and, if wanted, "index" (place of each map's picture
                   in sorted order), or "ids"
.zarr              an array, or a group with one
.pt, .pth          a tensor, or a dict with one; read with weights_only, so that no code in the file runs
.safetensors       a tensor; ids as a JSON list under "ids" in its metadata

Maps are (n, H, W) or (n, C, H, W), of any size, one a picture.  Everything but .npz and a .pt of old format stays on
disk until it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst.domains.labels import shorten
from pfungst.errors import DataError, MissingExtra, first_line, need
from pfungst.vectors import area_matrix

_NAMES = ("relevance", "attribution", "attributions", "relevances", "heatmaps", "maps")
_BESIDE = ("ids", "index", "label", "labels", "prediction", "predictions", "target", "targets")
_KINDS = "give a .npy, .npz, .h5, .zarr, .pt or .safetensors file with maps (n, H, W) or (n, C, H, W)"
_AT_ONCE = 256  # maps that are read at once


@dataclass(frozen=True)
class RelevanceFile:
    """Maps of the pictures of an audit.  ``order``: (n,) row of the file for each picture."""

    path: Path
    order: np.ndarray
    _array: Any

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Maps of these pictures, channels summed, (m, H, W) float32.

        Raises DataError where one of them is not finite.
        """
        wanted = self.order[rows]
        order = np.argsort(wanted, kind="stable")
        maps = np.empty((len(rows), *self._array.shape[-2:]), np.float32)
        # Runs of rows that follow each other, since not every kind of file can pick single ones.
        for places in np.split(order, np.flatnonzero(np.diff(wanted[order]) != 1) + 1) if len(rows) else ():
            part = self._array[int(wanted[places[0]]) : int(wanted[places[-1]]) + 1]
            values = part.float().numpy() if isinstance(part, Tensor) else np.asarray(part, dtype=np.float32)
            maps[places] = values.sum(1) if values.ndim == 4 else values
        return maps

    def read_pixels(self, rows: np.ndarray, size: tuple[int, int]) -> Tensor:
        """The same in the size of the model's input, (m, height, width): by area, so that sums are kept."""
        maps = torch.from_numpy(self.read(rows))
        if tuple(maps.shape[1:]) == size:
            return maps
        rows_of, columns_of = (area_matrix(have, want) for have, want in zip(maps.shape[1:], size, strict=True))
        return torch.einsum("gh,nhw,kw->ngk", rows_of, maps, columns_of)

    def digest(self, ids: Sequence[str], progress: Callable[[int, int], None] | None = None) -> str:
        """sha256 (hex) over the maps in the order of the pictures, whatever file they are in; reads all of them.

        Raises DataError where a map is not finite; ``ids`` are the names of the pictures for that.
        """
        total = hashlib.sha256(repr(tuple(self._array.shape[-2:])).encode())
        for start in range(0, len(self.order), _AT_ONCE):
            rows = np.arange(start, min(start + _AT_ONCE, len(self.order)))
            maps = self.read(rows)
            bad = np.flatnonzero(~np.isfinite(maps).all((1, 2)))
            if len(bad):
                raise DataError(
                    f"{self.path}: the map of {ids[rows[bad[0]]]} holds NaN or infinity",
                    "make these maps anew, or leave their pictures out with a manifest",
                )
            total.update(maps.astype("<f4").data)
            if progress is not None:
                progress(int(rows[-1]) + 1, len(self.order))
        return total.hexdigest()


def open_relevance(path: str | Path, ids: Sequence[str]) -> RelevanceFile:
    """The file's maps for the pictures ``ids``, in their order.

    Without names in the file its rows are the pictures in sorted order, so there must be as many.

    Raises DataError: no such file, another kind or shape, another number of maps, a picture without a map.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist", _KINDS)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"relevance of the kind {suffix or path.name!r} cannot be read", _KINDS)
    try:
        array, names = _READERS[suffix](path)
    except (DataError, MissingExtra):
        raise
    except Exception as error:  # Every reader has errors of its own.
        raise DataError(f"{path} cannot be read: {first_line(error)}", _KINDS) from error
    _check(path, array)
    return RelevanceFile(path, _arrange(path, int(array.shape[0]), names, ids), array)


def _check(path: Path, array: Any) -> None:
    shape = tuple(array.shape)
    if len(shape) not in (3, 4) or 0 in shape or min(shape[-2:]) < 2:
        channels_last = " (channels last?)" if len(shape) == 4 and shape[-1] == 1 else ""
        raise DataError(f"{path} holds an array of shape {shape}{channels_last}", _KINDS)
    if len(shape) == 4 and shape[-1] in (3, 4) and shape[1] > 4:
        raise DataError(
            f"{path} holds maps of shape {shape[1:]}, whose channels come last", "save np.moveaxis(maps, -1, 1)"
        )
    kind = array.dtype
    real = kind.is_floating_point if isinstance(kind, torch.dtype) else np.dtype(kind).kind in "fiu"
    if not real:
        raise DataError(f"{path} holds {kind}, no real numbers", "save the maps as float32")


def _arrange(path: Path, count: int, names: Any, ids: Sequence[str]) -> np.ndarray:
    """Row of the file for each picture."""
    if names is None:
        if count != len(ids):
            raise DataError(
                f"{path} holds {count} maps, there are {len(ids)} pictures",
                'give one map a picture, in sorted order, or beside the maps an array "ids" that names their pictures',
            )
        return np.arange(count)
    known = names.tolist() if isinstance(names, np.ndarray) else list(names)
    known = [name.decode() if isinstance(name, bytes) else name for name in known]
    if len(known) != count:
        raise DataError(f"{path} holds {count} maps and {len(known)} names of pictures", "give one name a map")
    wanted: Sequence[Any] = ids
    if all(isinstance(name, int) for name in known):
        wanted = range(len(ids))  # CoRelAy's index: the place of the picture
    row = {name: number for number, name in enumerate(known)}
    if len(row) < count:
        raise DataError(f"{path} names a picture more than once", "give one map a picture")
    missing = [ids[number] for number, name in enumerate(wanted) if name not in row]
    if missing:
        raise DataError(
            f"{path} has no map of {len(missing)} of the {len(ids)} pictures: {shorten(missing)}",
            "name pictures as the audit does: relative to the folder of pictures, as in rose/01.png",
        )
    return np.array([row[name] for name in wanted])


def _choose(path: Path, found: Mapping[str, Any]) -> Any:
    """The maps among arrays by name."""
    for name in _NAMES:
        if name in found:
            return found[name]
    others = [name for name in found if name not in _BESIDE]
    if len(others) != 1:
        raise DataError(
            f"{path} holds {shorten(map(repr, found)) or 'no arrays'}, and which are the maps is not known",
            f"name them {_NAMES[0]!r}",
        )
    return found[others[0]]


# ---- kinds of file: each reader gives the maps and, if the file has them, names of pictures ----------------------


def _read_npy(path: Path) -> tuple[Any, Any]:
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _read_npz(path: Path) -> tuple[Any, Any]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file", _KINDS)
    with np.load(path, allow_pickle=False) as file:
        name = _choose(path, {name: name for name in file.files})
        return file[name], file["ids"] if "ids" in file.files else None


def _read_hdf5(path: Path) -> tuple[Any, Any]:
    h5py = need("h5py", "bridges", "relevance in HDF5 needs h5py")
    file = h5py.File(path, "r")
    maps = _choose(path, dict(file))
    if isinstance(maps, h5py.Group):
        raise DataError(f"{path}: {maps.name} is a group", "save the maps as one dataset (n, C, H, W)")
    return maps, next((file[name][:] for name in ("ids", "index") if name in file), None)


def _read_zarr(path: Path) -> tuple[Any, Any]:
    import zarr

    opened: Any = zarr.open(path, mode="r")
    if isinstance(opened, zarr.Array):
        return opened, None
    arrays = dict(opened.arrays())
    maps = _choose(path, arrays)
    return maps, np.asarray(arrays["ids"][:]) if "ids" in arrays else opened.attrs.get("ids")


def _read_torch(path: Path) -> tuple[Any, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused: it is a pickle that holds more than tensors (or is damaged), and loading one runs "
            f"whatever code is in it ({first_line(error)})",
            "save the maps alone, where the file comes from: torch.save({'relevance': maps, 'ids': ids}, 'maps.pt')",
        ) from error
    if isinstance(content, Tensor):
        return content.detach(), None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds {type(content).__name__}, no tensor", _KINDS)
    tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    return _choose(path, tensors), content.get("ids")


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        name = _choose(path, dict(zip(names, names, strict=True)))
        ids = (file.metadata() or {}).get("ids")
        part = file.get_slice(name)
        return _Slices(part), None if ids is None else json.loads(ids)


class _Slices:
    """A tensor of a safetensors file, read by slices."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self.shape = tuple(part.get_shape())
        self.dtype = part[:1].dtype

    def __getitem__(self, rows: slice) -> Tensor:
        found: Tensor = self._part[rows]
        return found


_READERS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".zarr": _read_zarr,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}
