"""Pictures: what a sample is, where its label comes from, and how a batch of them is read.

Nothing is decoded until ``load_batch``, and a picture that cannot be read is a reported skip, never an error.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pfungst.domains.decoding import UnreadableImage, list_conversions, open_image
from pfungst.domains.labels import match_classes, shorten, spread_rows
from pfungst.domains.manifests import read_manifest
from pfungst.domains.preprocessing import SIZE_REMEDY, Preprocess
from pfungst.errors import DataError, ModelError, PfungstWarning

__all__ = [
    "ImageData",
    "Preprocess",
    "UnreadableImage",
    "complete_preprocess",
    "load_batch",
    "open_image",
    "read_images",
]

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"])
MANIFESTS = (".csv", ".parquet")
_LOOKED_AT = 64  # pictures whose headers say what is converted


@dataclass(frozen=True, eq=False)
class ImageData:
    """Pictures on disk with their labels; nothing is decoded yet.

    ``ids``: unique and stable, the path relative to the folder or as the manifest has it.
    ``labels``: (n,) int64, indices of ``classes``; -1 = no label.  ``classes`` may be empty where nobody names any.
    ``metadata``: the manifest's other columns, one row a picture.  ``notes``: what a user should know about the data.
    """

    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    metadata: pa.Table | None
    root: Path
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageData:
        """The pictures at these positions, in this order."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        return ImageData(
            ids=tuple(self.ids[index] for index in chosen),
            paths=tuple(self.paths[index] for index in chosen),
            labels=self.labels[chosen].copy(),
            classes=self.classes,
            metadata=None if self.metadata is None else self.metadata.take(pa.array(chosen)),
            root=self.root,
            notes=self.notes,
        )

    def digest(self, progress: Callable[[int, int], None] | None = None) -> str:
        """sha256 (hex) over class names and over id, label and content of every file, in order.

        Reads every file once, in pieces; ``progress(done, total)`` is called after each.  A file that cannot be read
        counts as such, so that the digest changes when it is mended.
        """
        total = hashlib.sha256()
        _add(total, *self.classes)
        for done, (name, path, label) in enumerate(zip(self.ids, self.paths, self.labels, strict=True), 1):
            _add(total, name, str(int(label)), _content(path))
            if progress is not None:
                progress(done, len(self))
        return total.hexdigest()


def read_images(path: str | Path, classes: Sequence[str] | None = None) -> ImageData:
    """The pictures of a folder (one subfolder a class, or flat), of a .csv or .parquet manifest, or one picture.

    ``classes``: the model's class names in its order, to which folder names and labels are matched (see
    ``match_classes``); without them the sorted names are the classes.  Hidden files are left out; links are followed,
    each folder once a class.  The notes tell what is converted, as far as some pictures of each class show it
    (``note_conversions``).

    Raises DataError where there is nothing to read, or a label is not among the classes.
    """
    data = _list_images(Path(path).expanduser(), classes)
    return replace(data, notes=(*data.notes, *note_conversions(data)))


def note_conversions(data: ImageData) -> list[str]:
    """What reading these pictures decides that the model's training may have decided otherwise, in sentences.

    Some pictures are looked at, evenly from the classes.  Warns (PfungstWarning) where 16-bit pixels use so little of
    their range that hardly anything of them is left in 8 bits.
    """
    rows = spread_rows(data.labels, _LOOKED_AT, seed=0)
    found = {row: list_conversions(data.paths[row]) for row in rows.tolist()}
    looked = f"{len(rows)} pictures" + (" looked at" if len(rows) < len(data) else "")
    notes = []
    for text in sorted({text for one in found.values() for text in one.told}):
        own = [row for row, one in found.items() if text in one.told]
        notes.append(f"{len(own)} of {looked}: {text} (such as {data.ids[own[0]]})")
    brightest = max(found.values(), key=lambda one: one.levels or 0, default=None)  # of those of 16 bits, if any
    if brightest is not None and brightest.dark:
        notes.append(brightest.tell_dark())
        warnings.warn(notes[-1], PfungstWarning, stacklevel=3)
    return notes


def _list_images(path: Path, classes: Sequence[str] | None) -> ImageData:
    if path.is_dir():
        return _read_folder(path, classes)
    if not path.exists():
        raise DataError(f"{path} does not exist", "give a folder of images, or a .csv or .parquet manifest")
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return _without_labels([path], path.parent, classes)
    if suffix not in MANIFESTS:
        raise DataError(
            f"{path} is neither a folder of images nor a .csv or .parquet manifest",
            "unpack archives first; a manifest has the columns path and, if known, label",
        )
    manifest = read_manifest(path, classes)
    return ImageData(
        ids=manifest.ids,
        paths=tuple(path.parent / name for name in manifest.ids),
        labels=manifest.labels,
        classes=manifest.classes,
        metadata=manifest.metadata,
        root=path.parent,
        notes=manifest.notes,
    )


def load_batch(
    data: ImageData, indices: Sequence[int] | np.ndarray, preprocess: Preprocess, workers: int = 0
) -> tuple[torch.Tensor, list[int], dict[int, str]]:
    """Read and preprocess the pictures at ``indices``.

    Returns the inputs (m, C, H, W), float32; the m of the indices they belong to, in the order asked for; and for
    every other index the reason why it was left out.  ``workers``: threads; 0 reads in the calling thread.
    """
    pixels, read, skipped = read_pixels(data, indices, preprocess, workers)
    return preprocess.to_inputs(torch.from_numpy(pixels)), read, skipped


def read_pixels(
    data: ImageData, indices: Sequence[int] | np.ndarray, preprocess: Preprocess, workers: int = 0
) -> tuple[np.ndarray, list[int], dict[int, str]]:
    """``load_batch`` without the last step: the pictures (m, ...) as ``Preprocess.to_array`` gives them."""
    wanted = [int(index) for index in indices]
    needed = _needed(preprocess)
    arrays = np.empty((len(wanted), *preprocess.array_shape), preprocess.array_type)  # filled by the threads

    def load(place: int) -> str | None:
        try:
            image = open_image(data.paths[wanted[place]], needed)
        except UnreadableImage as error:
            return str(error)
        try:
            arrays[place] = preprocess.to_array(image)
        except Exception as error:  # The model's own callable may raise anything.
            return f"preprocessing failed: {error or type(error).__name__}"
        return None

    places = range(len(wanted))
    if workers > 0 and len(wanted) > 1:
        with ThreadPoolExecutor(max_workers=min(workers, len(wanted))) as pool:
            reasons = list(pool.map(load, places))
    else:
        reasons = [load(place) for place in places]
    read = [place for place in places if reasons[place] is None]
    skipped = {wanted[place]: reason for place, reason in enumerate(reasons) if reason is not None}
    return arrays if len(read) == len(wanted) else arrays[read], [wanted[place] for place in read], skipped


def complete_preprocess(preprocess: Preprocess | None, data: ImageData) -> Preprocess:
    """A model's preprocessing; the range of a function's values is measured on the first pictures, if any can be read.

    Raises ModelError where the model has none.
    """
    if preprocess is None:
        raise ModelError("the model does not say how pictures are prepared", SIZE_REMEDY)
    if preprocess.low is None:
        inputs, ok, _ = load_batch(data, range(min(len(data), 64)), preprocess)
        if ok:
            return preprocess.measured(inputs.amin((0, 2, 3)), inputs.amax((0, 2, 3)))
    return preprocess


def _needed(preprocess: Preprocess) -> int | None:
    """Pixels of the short side that the resize asks for; None where it must see every pixel."""
    if preprocess.custom is not None or (preprocess.crop == "center" and preprocess.resize is None):
        return None
    target = preprocess.resize or preprocess.size
    return max(target) if isinstance(target, tuple) else target


def _read_folder(root: Path, classes: Sequence[str] | None) -> ImageData:
    root = Path(os.path.abspath(root))
    loose, folders = _scan(root)
    notes: list[str] = []
    found = {folder.name: _walk(folder, root, notes) for folder in folders}
    full = {name: paths for name, paths in found.items() if paths}
    empty = [name for name, paths in found.items() if not paths]
    if not full and not loose:
        raise DataError(
            f"{root} holds no images ({', '.join(sorted(SUFFIXES))})",
            "give the folder that holds the images, or one subfolder a class",
        )
    notes += [f"empty class: the folder {_printable(name)} holds no image" for name in empty]
    if not full:
        return _without_labels(loose, root, classes, notes)
    if loose:
        notes.append(f"{len(loose)} images beside the class folders have no label")
    if classes is None:
        names = tuple(sorted(_printable(name) for name in found))
        index_of = {name: names.index(_printable(name)) for name in full}
    else:
        names, index_of = tuple(classes), match_classes(full, classes)
        notes += _merged(index_of, names)
    paths = [*loose, *(path for name in full for path in full[name])]
    labels = [-1] * len(loose) + [index_of[name] for name in full for _ in full[name]]
    return _from_paths(paths, labels, names, root, notes)


def _merged(index_of: dict[str, int], classes: tuple[str, ...]) -> list[str]:
    """Notes on folders that name the same class."""
    sharing: dict[int, list[str]] = {}
    for name, index in index_of.items():
        sharing.setdefault(index, []).append(name)
    return [
        f"the folders {shorten(names)} are one class: {classes[index]}"
        for index, names in sharing.items()
        if len(names) > 1
    ]


def _without_labels(
    paths: list[Path], root: Path, classes: Sequence[str] | None, notes: Sequence[str] = ()
) -> ImageData:
    return _from_paths(paths, [-1] * len(paths), tuple(classes or ()), root, notes)


def _from_paths(
    paths: list[Path], labels: list[int], classes: tuple[str, ...], root: Path, notes: Sequence[str]
) -> ImageData:
    ids = [_printable(path.relative_to(root).as_posix()) for path in paths]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return ImageData(
        ids=tuple(ids[index] for index in order),
        paths=tuple(paths[index] for index in order),
        labels=np.asarray([labels[index] for index in order], dtype=np.int64),
        classes=classes,
        metadata=None,
        root=root,
        notes=tuple(notes),
    )


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images and the subfolders of one folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}", "check its permissions") from error
    folders = [Path(entry.path) for entry in visible if entry.is_dir()]
    images = [
        Path(entry.path)
        for entry in visible
        # A link to nowhere is kept: it is reported as a picture that could not be read.
        if Path(entry.name).suffix.lower() in SUFFIXES
        and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))
    ]
    return images, folders


def _walk(top: Path, root: Path, notes: list[str]) -> list[Path]:
    """All images below a class folder.  Each real folder is entered once, so that circular links end."""
    seen = {os.path.realpath(root)}
    images: list[Path] = []
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            notes.append(f"not entered again: {_printable(folder.relative_to(root).as_posix())} is a link to {real}")
            continue
        seen.add(real)
        here, below = _scan(folder)
        images += here
        waiting += reversed(below)
    return images


def _printable(name: str) -> str:
    """A file name that is not UTF-8 with its odd bytes written out, so that tables and JSON can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _content(path: Path) -> str:
    if not path.is_file():
        return "missing"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _add(total: hashlib._Hash, *parts: str) -> None:
    # Each part with its length, so that no two lists of parts give the same bytes.
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    total.update(b"\n")
