"""Relevance made elsewhere: read from every kind of file, and audited like pfungst's own."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import Console, Small

import pfungst
from pfungst.errors import DataError, MissingExtra, PfungstError, RunError, SettingError
from pfungst.imports import open_relevance
from pfungst.runs import guard_finding
from pfungst.settings import Settings

IDS = [f"{name}/{i}.png" for name in "ab" for i in range(150)]  # more than one piece of 256
MAPS = np.random.default_rng(0).normal(size=(300, 2, 5, 7)).astype(np.float32)


def save_npy(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    np.save(folder / "maps.npy", maps)
    return folder / "maps.npy"


def save_npz(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    np.savez(folder / "maps.npz", relevance=maps, **({"ids": np.array(ids)} if ids else {}))
    return folder / "maps.npz"


def save_hdf5(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "maps.h5", "w") as file:  # as CoRelAy and ViRelAy have it, and names
        file["attribution"] = maps
        file["prediction"], file["label"] = np.zeros((len(maps), 3), np.float32), np.zeros(len(maps), np.uint16)
        if ids:
            file["ids"] = ids
    return folder / "maps.h5"


def save_zarr(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    group = zarr.open_group(folder / "maps.zarr", mode="w")
    group.create_array("relevance", data=maps)
    if ids:
        group.attrs["ids"] = ids
    return folder / "maps.zarr"


def save_torch(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    tensor = torch.from_numpy(maps).requires_grad_()
    torch.save({"attributions": tensor, "ids": ids} if ids else tensor, folder / "maps.pt")
    return folder / "maps.pt"


def save_old_torch(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    content = {"maps": torch.from_numpy(maps), **({"ids": ids} if ids else {})}
    torch.save(content, folder / "maps.pth", _use_new_zipfile_serialization=False)
    return folder / "maps.pth"


def save_safetensors(folder: Path, maps: np.ndarray, ids: list[str] | None) -> Path:
    from safetensors.torch import save_file

    path = folder / "maps.safetensors"
    save_file({"heat": torch.from_numpy(maps)}, path, metadata={"ids": json.dumps(ids)} if ids else None)
    return path


SAVERS = [save_npy, save_npz, save_hdf5, save_zarr, save_torch, save_old_torch, save_safetensors]
Saver = Callable[[Path, np.ndarray, "list[str] | None"], Path]


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_every_kind_of_file(save: Saver, tmp_path: Path) -> None:
    def folder(name: str) -> Path:  # a file that is open must not be written anew
        (tmp_path / name).mkdir()
        return tmp_path / name

    opened = open_relevance(save(folder("1"), MAPS, None), IDS)
    rows = np.array([299, 0, 1, 2, 151, 0])
    assert np.allclose(opened.read(rows), MAPS[rows].sum(1), atol=1e-6)
    assert opened.read(np.array([], dtype=int)).shape == (0, 5, 7)
    plain = open_relevance(save(folder("2"), MAPS.sum(1), None), IDS)
    assert np.allclose(plain.read(rows), MAPS[rows].sum(1), atol=1e-6)
    assert opened.digest(IDS) == open_relevance(save_npy(folder("3"), MAPS, None), IDS).digest(IDS)
    if save is save_npy:
        return
    order = np.random.default_rng(1).permutation(300)
    named = open_relevance(save(folder("4"), MAPS[order], [IDS[i] for i in order]), IDS)
    assert np.allclose(named.read(rows), MAPS[rows].sum(1), atol=1e-6)
    assert named.digest(IDS) == opened.digest(IDS), "the same maps in another order"
    assert len(open_relevance(save(folder("5"), MAPS, IDS), IDS[40:50]).order) == 10, "more maps than pictures"


def test_the_index_of_corelay(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    order = np.random.default_rng(1).permutation(300)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["attribution"], file["index"] = MAPS[order], order.astype(np.uint32)
    assert np.allclose(open_relevance(tmp_path / "a.h5", IDS).read(np.arange(300)), MAPS.sum(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_other_numbers(dtype: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (100 * MAPS).clip(-127, 127).astype(dtype))
    found = open_relevance(tmp_path / "a.npy", IDS).read(np.arange(300))
    assert np.allclose(found, (100 * MAPS).clip(-127, 127).astype(dtype).astype(float).sum(1), rtol=1e-5, atol=1e-2)


def test_half_precision_tensors(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(MAPS).bfloat16(), tmp_path / "a.pt")
    expected = torch.from_numpy(MAPS).bfloat16().float().numpy().sum(1)
    assert np.array_equal(open_relevance(tmp_path / "a.pt", IDS).read(np.arange(300)), expected)


def test_pixels_have_the_size_of_the_input_and_keep_sums(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.abs(MAPS))
    opened = open_relevance(tmp_path / "a.npy", IDS)
    for size in ((40, 56), (12, 12), (3, 4)):
        pixels = opened.read_pixels(np.arange(20), size)
        assert pixels.shape == (20, *size)
        assert np.allclose(pixels.sum((1, 2)), np.abs(MAPS[:20]).sum((1, 2, 3)), rtol=1e-5)
    blocks = opened.read_pixels(np.arange(20), (40, 56))
    assert np.allclose(blocks, opened.read(np.arange(20)).repeat(8, 1).repeat(8, 2) / 64, rtol=1e-5)
    assert np.array_equal(opened.read_pixels(np.arange(20), (5, 7)), opened.read(np.arange(20)))


def spoiled() -> np.ndarray:
    maps = MAPS.copy()
    maps[270, 0, 0, 0] = np.nan
    return maps


REFUSED = {
    "count": (MAPS[:299], None, "holds 299 maps, there are 300 pictures.*\n.*sorted order"),
    "vectors": (MAPS[:, 0, 0], None, r"an array of shape \(300, 7\)"),
    "channels last": (MAPS.repeat(20, 1).transpose(0, 2, 1, 3)[..., :3], None, r"channels come last\n.*moveaxis"),
    "no numbers": (MAPS > 0, None, "holds bool"),
    "nan": (spoiled(), None, r"the map of b/120.png holds NaN"),
    "no map": (MAPS, ["x", *IDS[1:]], "no map of 1 of the 300 pictures: a/0.png"),
    "twice": (MAPS, [IDS[1], *IDS[1:]], "names a picture more than once"),
    "names": (MAPS, IDS[1:], "300 maps and 299 names"),
}


@pytest.mark.parametrize(("maps", "ids", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(maps: np.ndarray, ids: list[str] | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        open_relevance(save_npz(tmp_path, maps, ids), IDS).digest(IDS)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, words: str, kind: type[PfungstError] = DataError) -> None:
        with pytest.raises(kind, match=words) as caught:
            open_relevance(tmp_path / name, IDS)
        assert caught.value.remedy

    refuse("a.npy", "does not exist")
    for name in ("a.csv", "a.npy", "a.npz", "a.pt", "a.safetensors", "a.h5", "a.zarr"):
        (tmp_path / name).write_bytes(b"nonsense")
        refuse(name, "of the kind '.csv'" if name == "a.csv" else f"{name} ")
    np.savez(tmp_path / "b.npz", one=MAPS, two=MAPS)
    refuse("b.npz", "'one', 'two', and which are the maps is not known")
    np.save(tmp_path / "b.npy", np.array([MAPS, None], dtype=object), allow_pickle=True)
    refuse("b.npy", "cannot be read")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    for name in ("c.pt", "c.npy", "c.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        refuse(name, "refused|cannot be read|no .npz")
    torch.save({"relevance": Evil()}, tmp_path / "d.pt")
    refuse("d.pt", "refused: it is a pickle")
    assert not ran.exists()
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    refuse("a.h5", "needs h5py", MissingExtra)


# ---- an audit of such maps -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(small: Small, tmp_path_factory: pytest.TempPathFactory) -> pfungst.Audit:
    """An audit with maps of pfungst's own, all kept."""
    out = tmp_path_factory.mktemp("engine") / "run"
    return pfungst.audit(small.model, small.photos, out=out, full_maps=True, **small.settings)


@pytest.fixture(scope="module")
def audited(engine: pfungst.Audit, small: Small, tmp_path_factory: pytest.TempPathFactory) -> pfungst.Audit:
    """The same maps, from a file, in which they lie in another order."""
    folder = tmp_path_factory.mktemp("imported")
    order = np.random.default_rng(0).permutation(80)
    ids = [engine.subject.data.ids[i] for i in order]
    path = save_npz(folder, engine.run.read_array("relevance")[order], ids)
    return pfungst.audit(
        small.model, small.photos, out=folder / "run", full_maps=True, relevance=str(path), **small.settings
    )


def test_the_engines_own_maps_come_back(engine: pfungst.Audit, audited: pfungst.Audit) -> None:
    for name in ("relevance", "target", "prediction", "probability", "target_probability", "status", "properties"):
        assert np.array_equal(audited.run.read_array(name), engine.run.read_array(name)), name
    for name in ("where", "explained", "absorbed"):
        assert np.allclose(audited.run.read_array(name), engine.run.read_array(name), atol=1e-5), name
    assert audited.subject.layers == ()
    with pytest.raises(RunError, match="holds no 'what:colours'"):
        audited.run.read_array("what:colours")
    description = audited.run.describe()
    assert description["preset"] == "none: relevance made elsewhere, maps.npz"
    assert re.fullmatch("[0-9a-f]{64}", description["relevance"]["digest"])
    assert "relevance" not in engine.run.describe()
    assert "relevance made elsewhere" in audited.report.read_text()


def test_the_cheat_is_found_in_them_and_confirmed(audited: pfungst.Audit) -> None:
    first = audited.findings[0]
    assert (first.verdict, first.record["views"][0]) == ("confirmed", "where")
    assert first.samples == [f"rose/{i:02d}.png" for i in range(16)]
    assert first.where["source"] == "pixels"
    _, _, right, bottom = first.where["box"]
    assert max(right, bottom) <= 7


def test_the_region_is_found_in_the_given_maps(engine: pfungst.Audit, small: Small, tmp_path: Path) -> None:
    """Maps that are wrong on purpose lead to a group, and to a region, that the model does not use."""
    wrong = np.random.default_rng(0).uniform(0, 0.01, (80, 12, 12))
    wrong[40:60, 9:, 9:] = 1  # the bottom right corner of 20 roses, where there is nothing
    np.save(tmp_path / "wrong.npy", wrong)
    settings = {**small.settings, "relevance": str(tmp_path / "wrong.npy"), "max_findings": 1}
    found = pfungst.audit(small.model, small.photos, out=tmp_path / "run", **settings).findings[0]
    assert found.samples == [f"rose/{i:02d}.png" for i in range(20)]
    assert found.verdict != "confirmed"
    left, top, _, _ = found.where["box"]
    assert min(left, top) >= 12


def test_the_command_and_what_is_refused(
    audited: pfungst.Audit, small: Small, console: Console, tmp_path: Path
) -> None:
    path = str(audited.subject.settings.relevance)
    flags = [*small.flags(relevance=path), "--full-maps"]
    command = ["audit", small.model, small.photos, "--out", audited.run.path, *flags]
    assert console(*command)[0] == 0, "the same audit again"
    with np.load(path) as file:
        maps, ids = file["relevance"], file["ids"]
    copy = shutil.copy(path, tmp_path / "kept.npz")
    np.savez(path, relevance=maps + 1, ids=ids)
    try:
        code, _, error = console(*command)
        assert code == 1
        assert "relevance.digest was" in error
        with pytest.raises(RunError, match="holds other maps than"):
            pfungst.reopen(audited.run.path)
    finally:
        shutil.copy(copy, path)
    code, _, error = console("audit", small.model, small.photos, "--out", tmp_path / "run", *flags, "--limit", "40")
    assert code == 0, error  # names say which maps are meant
    np.save(tmp_path / "short.npy", maps[:79])
    flags = small.flags(relevance=tmp_path / "short.npy")
    code, _, error = console("audit", small.model, small.photos, "--out", tmp_path / "other", *flags)
    assert (code, "79 maps, there are 80 pictures" in error) == (1, True)
    assert not (tmp_path / "other" / "run.json").exists()


def test_a_finding_in_them_is_confirmed_again(audited: pfungst.Audit, tmp_path: Path) -> None:
    opened = pfungst.reopen(audited.run.path)
    again = opened.findings[0].confirm(seed=3, presets=["epsilon"])
    assert again.verdict == "confirmed"
    guard = guard_finding(audited.run.path, "f001", tmp_path / "test_cue.py")
    assert guard.fails
    with pytest.raises(SettingError, match="made elsewhere"):
        opened.findings[0].confirm(seed=4, folders=[audited.subject.data.root])


def test_a_model_that_the_engine_cannot_explain(small: Small, tmp_path: Path) -> None:
    class Unknown(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores(torch.linalg.svdvals(x).mean(2))

    model = Unknown().eval()
    settings = {key: value for key, value in small.settings.items() if key != "weights"}
    with pytest.raises(PfungstError, match="svd"):
        pfungst.audit(model, small.photos, out=tmp_path / "a", **settings)
    np.save(tmp_path / "maps.npy", np.random.default_rng(0).normal(size=(80, 24, 24)))
    audit = pfungst.audit(
        model, small.photos, out=tmp_path / "b", relevance=str(tmp_path / "maps.npy"), target="predicted", **settings
    )
    assert not [finding for finding in audit.findings if finding.verdict == "confirmed"]
    assert Settings(relevance="x").record()["relevance"] == "x"
