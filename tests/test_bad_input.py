"""Bad input to ``audit``: each is an error with cause and remedy, or a reported skip, and finished work stays."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NET, Console, Small
from PIL import Image
from test_image import png

import pfungst
from pfungst.errors import DataError, ModelError, PfungstError, RelevanceError, RunError, SettingError

ODD = """

class Odd(Net):
    def forward(self, x):
        y = super().forward(x)
        black = x[:, :1, -1, -1] < 0.002  # a picture with a black last pixel
        if self.kind == "nan":
            return y + torch.where(black, torch.nan, 0.0)
        if self.kind == "always nan":
            return y * torch.nan
        if self.kind == "fails" and bool(black.any()):
            raise KeyError("black")
        if self.kind == "asserts":
            assert x.shape[-1] == 32, "only 32 pixels"
        return (y, x) if self.kind == "tuple" else y


def odd(kind):
    def build():
        model = Odd()
        model.kind = kind
        return model
    return build


tuple_, nan, always_nan = odd("tuple"), odd("nan"), odd("always nan")
fails, asserts = odd("fails"), odd("asserts")


def grey():
    return Net(channels=1)


def three():
    return Net(outputs=3)


def named():
    model = Net()
    model.classes = ["leaf", "rose [b]"]
    return model
"""


@pytest.fixture(scope="module")
def odd(small: Small) -> str:
    """A file of models, most of which have a fault; put ``:function`` behind it."""
    (small.root / "odd.py").write_text(NET + ODD)
    return str(small.root / "odd.py")


def message(error: str) -> str:
    """The one message on standard error (bars of progress may stand above it), and no traceback."""
    assert "Traceback" not in error
    start = f"\n{error}".index("\nError: ")
    assert "\nError" not in error[start + 1 :]
    return error[start + 7 :].strip()


def aside(run: Path) -> dict[str, str]:
    """Why each sample was set aside, by its id, from ``samples.parquet``; the report says the same."""
    table = pq.read_table(run / "samples.parquet").to_pydict()
    reasons = {name: why for name, why in zip(table["id"], table["set_aside"], strict=True) if why}
    html = (run / "report.html").read_text()
    for name, why in reasons.items():
        assert name in html
        assert why in html
    return reasons


# ---- errors ----------------------------------------------------------------------------------------------------------


def flat(small: Small, folder: Path) -> Path:
    folder.mkdir()
    for path in small.photos.glob("*/0[0-3].png"):
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    return folder


def with_folder(small: Small, folder: Path, name: str) -> Path:
    shutil.copytree(small.photos / "leaf", small.copy(folder) / name)
    return folder


def one_class(small: Small, folder: Path) -> Path:
    shutil.copytree(small.photos / "rose", folder / "rose [b]")
    return folder


def unreadable(small: Small, folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_text("no picture")
    return folder


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def saved(path: Path, state: dict[str, torch.Tensor]) -> str:
    torch.save(state, path)
    return str(path)


def blackened(small: Small, folder: Path, names: tuple[str, ...]) -> Path:
    """The pictures, of which these have a black last pixel and all others a white one."""
    for path in small.copy(folder).glob("*/*.png"):
        pixels = np.array(Image.open(path))
        pixels[-1, -1] = 0 if str(path.relative_to(folder)) in names else 255
        Image.fromarray(pixels).save(path)
    return folder


Case = tuple[type[PfungstError], str, str, Callable[[Small, str, Path], dict[str, Any]]]

# Kind, words of the cause, words of the remedy, and what differs from the small audit (model, images, settings).
ERRORS: dict[str, Case] = {
    "tuple": (RelevanceError, "returns a tuple", "return self.model(x)[0]", lambda s, o, t: {"model": f"{o}:tuple_"}),
    "nan at once": (ModelError, "returns NaN or infinity for the first picture", "check the weights",
                    lambda s, o, t: {"model": f"{o}:always_nan"}),
    "forward fails": (ModelError, "AssertionError: only 32 pixels", "check --size", lambda s, o, t: {
        "model": f"{o}:asserts"}),
    "forward fails later": (ModelError, "failed on the pictures rose/00.png to rose/07.png: KeyError: 'black'",
                            "without pfungst", lambda s, o, t: {
        "model": f"{o}:fails", "images": blackened(s, t / "black", ("rose/03.png",)), "batch_size": 8}),
    "grey model": (ModelError, "cannot take an input of shape (1, 3, 24, 24)", "L is one grey channel",
                   lambda s, o, t: {"model": f"{o}:grey", "weights": None}),
    "grey preprocessing": (ModelError, "cannot take an input of shape (1, 1, 24, 24)", "--channels",
                           lambda s, o, t: {"channels": "L"}),
    "three means for one channel": (SettingError, "mean has 3 values for 1 channels", "one a channel",
                                    lambda s, o, t: {"channels": "L", "mean": "0.5,0.5,0.5"}),
    "strange label": (DataError, "2 labels are not among the 2 classes: 'rose', 'tree'", "--classes", lambda s, o, t: {
        "model": f"{o}:named", "images": with_folder(s, t / "strange", "tree")}),
    "more folders than outputs": (ModelError, "there are 3 classes (leaf, rose, tree), but the model has 2 outputs",
                                  "remove folders that are no classes", lambda s, o, t: {
        "images": with_folder(s, t / "more", "tree")}),
    "one class without names": (ModelError, "2 outputs, but the data name 1 classes", "--classes FILE",
                                lambda s, o, t: {"images": one_class(s, t / "one")}),
    "classes too short": (ModelError, "c.txt has 1 name (leaf)", "2 names, one a line, in the order of the outputs",
                          lambda s, o, t: {"images": flat(s, t / "flat"), "classes": written(t / "c.txt", "leaf\n")}),
    "classes too short for the folders": (
        ModelError, "the model has 2 outputs, but ", "--classes FILE with 2 names",
        lambda s, o, t: {"classes": written(t / "c.txt", "leaf\n")}),
    "a name among the classes is wrong": (
        DataError, "1 labels are not among the 2 classes: 'rose'; the classes are 'leaf', 'rosa'", "--classes",
        lambda s, o, t: {"classes": written(t / "c.txt", "leaf\nrosa\n")}),
    "classes too long": (ModelError, "c.txt has 3 names (leaf, rose, tree)", "--classes FILE",
                         lambda s, o, t: {"classes": written(t / "c.txt", "leaf\nrose\ntree\n")}),
    "no classes file": (SettingError, "cannot be read", "one name a line", lambda s, o, t: {"classes": t / "no.txt"}),
    "target": (DataError, "--target 'tulip' is no class", "one of leaf, rose", lambda s, o, t: {"target": "tulip"}),
    "no labels": (DataError, "the pictures have no labels", "--target predicted", lambda s, o, t: {
        "images": flat(s, t / "flat"), "target": "label"}),
    "all unreadable": (DataError, "none of the 3 pictures can be read, e.g. 0.jpg: not an image", "PNG or JPEG",
                       lambda s, o, t: {"images": unreadable(s, t / "bad")}),
    "no images": (DataError, "does not exist", "a folder of images", lambda s, o, t: {"images": t / "nowhere"}),
    "wrong shapes": (ModelError, "1 of another shape: scores.bias (file (7,), model (2,))", "this very architecture",
                     lambda s, o, t: {"weights": saved(t / "w.pt", {**torch.load(s.weights),
                                                                    "scores.bias": torch.zeros(7)})}),
    "damaged weights": (ModelError, "cannot be read as a state dict", "a .pt or .pth file with a state dict",
                        lambda s, o, t: {"weights": written(t / "w.pt", "PK\3\4 no archive")}),
    "out is a file": (RunError, "f is a file, not a folder", "--out", lambda s, o, t: {"out": written(t / "f", "")}),
    "out below a file": (RunError, "f is a file, not a folder", "--out", lambda s, o, t: {
        "out": Path(written(t / "f", "")) / "deep" / "run"}),
    "name too long": (RunError, "File name too long", "--out another folder", lambda s, o, t: {"out": t / ("x" * 300)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str, small: Small, odd: str, tmp_path: Path, console: Console) -> None:
    kind, cause, remedy, differ = ERRORS[name]
    given = {"model": small.model, "images": small.photos, "out": tmp_path / "run", **differ(small, odd, tmp_path)}
    model, images, out = (str(given.pop(key)) for key in ("model", "images", "out"))
    settings = {**small.settings, **given}
    if "mean" in settings:
        settings["mean"] = tuple(map(float, settings["mean"].split(",")))
    with pytest.raises(kind) as raised:
        pfungst.audit(model, images, out=out, **settings)
    assert cause in str(raised.value)
    assert remedy in raised.value.remedy
    code, output, error = console("audit", model, images, "--out", out, *small.flags(**given))
    assert code == 1
    assert output == ""
    assert message(error) == str(raised.value)
    assert not list(tmp_path.rglob("findings.json"))
    assert [path for path in tmp_path.rglob(".lock") if not path.with_name("run.json").exists()] == [], (
        "nothing is left"
    )


def test_unknown_setting(small: Small, tmp_path: Path, console: Console) -> None:
    with pytest.raises(SettingError, match="no setting 'colour'") as raised:
        pfungst.audit(small.model, small.photos, out=tmp_path / "run", colour=3)
    assert "batch_size" in raised.value.remedy
    code, _, error = console("audit", small.model, small.photos, "--out", tmp_path / "run", "--colour", "3")
    assert code == 2
    assert "Error: No such option '--colour'" in error
    wrong_values = (("batch_size", 0), ("grid", 3), ("channels", "CMYK"), ("suspicion", 1.5), ("size", 24.5))
    for name, value in (*wrong_values, ("batch_size", 8.5), ("seed", 1.5), ("alpha", math.nan), ("workers", True)):
        with pytest.raises(SettingError, match=f"{name} is {value!r}"):
            pfungst.audit(small.model, small.photos, out=tmp_path / "run", **{name: value})
    for wrong in ({"mean": "light"}, {"std": ("a", "b", "c")}, {"classes": 2}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))} is "):
            pfungst.audit(small.model, small.photos, out=tmp_path / "run", **{**small.settings, **wrong})
    assert not (tmp_path / "run" / "run.json").exists()


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("plain", [True, False])
def test_pickle_as_weights_is_not_run(plain: bool, small: Small, tmp_path: Path, console: Console) -> None:
    made, weights = tmp_path / "made", tmp_path / "weights.pt"
    content = {**torch.load(small.weights), "extra": Bomb(made)}
    if plain:
        weights.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, weights)
    settings = {**small.settings, "weights": str(weights)}
    with pytest.raises(ModelError, match="more than tensors"):
        pfungst.audit(small.model, small.photos, out=tmp_path / "run", **settings)
    code, _, error = console("audit", small.model, small.photos, "--out", tmp_path / "run", *small.flags(**settings))
    assert code == 1
    assert "torch.save(model.state_dict()" in message(error)
    assert not made.exists()
    if plain:
        pickle.loads(weights.read_bytes())
    else:
        torch.load(weights, weights_only=False)
    assert made.exists()  # it was live


def test_installed_command(small: Small, tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "pfungst"
    asked = [command, "audit", small.model, small.photos, "--out", tmp_path / "run", *small.flags(target="tulip")]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr == "Error: --target 'tulip' is no class\n  Remedy: it is label, predicted, or one of leaf, rose\n"
    )


def test_run_folder_within_the_pictures(small: Small, console: Console) -> None:
    out = small.photos / "run"
    with pytest.raises(SettingError, match="lies in the folder of pictures"):
        pfungst.audit(small.model, small.photos, out=out, **small.settings)
    code, _, error = console("audit", small.model, small.photos, "--out", out, *small.flags())
    assert code == 1
    assert "give --out another folder" in error
    assert not out.exists()


# ---- reported skips --------------------------------------------------------------------------------------------------

QUICK = {"min_size": 100}  # too few pictures for groups, so that an audit is over at once


def test_damaged_pictures_are_set_aside(small: Small, tmp_path: Path) -> None:
    photos = small.copy(tmp_path / "photos")
    whole = (photos / "rose" / "30.png").read_bytes()
    (photos / "rose" / "30.png").write_bytes(whole[: len(whole) // 2])
    (photos / "rose" / "31.png").write_bytes(b"")
    (photos / "rose" / "32.png").write_text("no picture")
    (photos / "leaf" / "link.png").symlink_to(tmp_path / "nowhere.png")
    # 30,000 x 30,000 pixels in a few kilobytes.  Decoded, they are 0.9 GB at one byte a pixel, and 2.7 GB as RGB.
    huge = photos / "leaf" / "huge.png"
    huge.write_bytes(png(30_000, 30_000, 1, 0, (b"\0" + bytes(30_000 // 8)) * 30_000))
    assert huge.stat().st_size < 200_000
    code = (
        "from pathlib import Path; from pfungst.cli import main; main(); status = Path('/proc/self/status'); "
        "print(status.read_text())"
    )
    asked = [sys.executable, "-c", code, "audit", small.model, str(photos), "--out", str(tmp_path / "run")]
    done = subprocess.run([*asked, *small.flags(**QUICK)], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak < 800_000  # kilobytes; torch itself takes about half of that
    reasons = aside(tmp_path / "run")
    assert all(why.startswith("unreadable: ") for why in reasons.values())
    expected = {
        "rose/30.png": "truncated", "rose/31.png": "0 bytes", "rose/32.png": "not an image",
        "leaf/link.png": "does not exist",
        "leaf/huge.png": "more than 178,000,000 pixels (image size (900000000 pixels)",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for name, why in expected.items():
        assert why in reasons[name].lower()
    for row in pq.read_table(tmp_path / "run" / "samples.parquet").to_pylist():
        nothing = [row[key] is None for key in ("prediction", "probability", "class", "score", "absorbed")]
        assert nothing == [row["id"] in expected] * 5


def test_nan_for_a_later_picture(small: Small, odd: str, tmp_path: Path, console: Console) -> None:
    # The leaves are pictures of another class for the finding on roses: a NaN among them must not spoil its tests.
    names = ("leaf/05.png", "leaf/20.png", "leaf/39.png", "rose/20.png")
    photos = blackened(small, tmp_path / "photos", names)
    out = tmp_path / "run"
    code, output, error = console("audit", f"{odd}:nan", photos, "--out", out, *small.flags(max_findings=1), "--json")
    assert (code, error) == (0, "")
    assert aside(out) == dict.fromkeys(names, "the model returns NaN or infinity")
    finding = json.loads(output)["findings"][0]
    assert (finding["class"], finding["verdict"], finding["where"]["box"]) == ("rose", "confirmed", [0, 0, 5, 5])
    assert np.isfinite([value for e in finding["evidence"] for value in (e["effect"], *e["interval"])]).all()


def test_image_of_a_manifest_that_is_missing(small: Small, tmp_path: Path, console: Console) -> None:
    rows = [f"{path},{path.parent.name}" for path in sorted(small.photos.glob("*/0*.png"))]
    manifest = written(tmp_path / "m.csv", "\n".join(["path,label", *rows, "gone/1.png,rose"]))
    code, output, error = console("audit", small.model, manifest, "--out", tmp_path / "run", *small.flags(**QUICK))
    assert code == 0, error
    assert "Nothing found" in output
    assert "1 picture could not be read: gone/1.png (the file does not exist)\n" in output
    assert aside(tmp_path / "run") == {"gone/1.png": "unreadable: the file does not exist"}
    again = console("audit", small.model, manifest, "--out", tmp_path / "run", *small.flags(**QUICK))[1]
    assert again == output, "a finished run tells it again"


def test_empty_class_folder(small: Small, odd: str, tmp_path: Path) -> None:
    (small.copy(tmp_path / "photos") / "tree").mkdir()
    state = torch.load(small.weights)
    state["scores.weight"] = torch.cat([state["scores.weight"], torch.full((1, 4), -5.0)])
    state["scores.bias"] = torch.zeros(3)
    weights = saved(tmp_path / "w.pt", state)
    settings = {**small.settings, "weights": weights, **QUICK}
    result = pfungst.audit(f"{odd}:three", tmp_path / "photos", out=tmp_path / "run", **settings)
    assert "empty class: the folder tree holds no image" in result.report.read_text()
    assert set(pq.read_table(result.run.path / "samples.parquet")["label"].to_pylist()) == {"leaf", "rose"}


def test_two_images_and_one_class(small: Small, odd: str, tmp_path: Path, console: Console) -> None:
    two = tmp_path / "two"
    for name in ("leaf", "rose"):
        (two / name).mkdir(parents=True)
        shutil.copy(small.photos / name / "00.png", two / name)
    code, output, error = console("audit", small.model, two, "--out", tmp_path / "a", *small.flags())
    assert code == 0, error
    assert "Nothing found" in output
    assert "too few samples to look for groups: 1, at least 16 are needed" in (tmp_path / "a/report.html").read_text()
    one = one_class(small, tmp_path / "one")
    result = pfungst.audit(f"{odd}:named", one, out=tmp_path / "b", **{**small.settings, "max_findings": 1})
    assert [finding.verdict for finding in result.findings] == ["open"]
    assert "no pictures of other classes" in result.findings[0].reason
    code, output, _ = console("audit", f"{odd}:named", one, "--out", tmp_path / "b", *small.flags(max_findings=1))
    assert code == 0
    assert f"class rose [b], {result.findings[0].size} pictures" in output


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_full_disk_in_the_middle_of_relevance(
    small: Small, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    for module in ("store", "maps"):
        monkeypatch.setattr(f"pfungst.{module}.BLOCK", 32)
    out = tmp_path / "run"
    true = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" in mode and out in self.parents and (out / "blocks.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return true(self, mode, *args, **options)

    asked = ["audit", small.model, small.photos, "--out", out, *small.flags()]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RunError, match="No space left on device") as raised:
            pfungst.audit(small.model, small.photos, out=out, **small.settings)
        assert "free some space and give the same command again" in raised.value.remedy
        code, _, error = console(*asked)
    assert code == 1
    assert message(error) == str(raised.value)
    assert json.loads((out / "blocks.json").read_text()) == [0]
    block = out / "pooled.zarr/where/c/0/0/0"
    written_at = block.stat().st_mtime_ns
    assert console(*asked)[0] == 0
    assert block.stat().st_mtime_ns == written_at
    assert len(list((out / "pooled.zarr/where/c").iterdir())) == 3
    assert small.results(out) == small.results(finished)


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of this size (a skip where none can be made); what it yields changes the size."""
    folder.mkdir()

    def mount(size: str, *more: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or mount(size):
        pytest.skip("no small disk can be mounted here")
    try:
        yield lambda size: None if mount(size, "remount") == 0 else pytest.fail("no remount")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_really_full(small: Small, finished: Path, tmp_path: Path, console: Console) -> None:
    with disk(tmp_path / "disk", "300k") as resize:
        asked = ["audit", small.model, small.photos, "--out", tmp_path / "disk" / "run", *small.flags()]
        code, _, error = console(*asked)
        assert code == 1
        assert "No space left on device\n  Remedy: free some space" in message(error)
        assert not (tmp_path / "disk" / "run" / "findings.json").exists()
        assert (tmp_path / "disk" / "run" / "blocks.json").exists()
        resize("30m")
        assert console(*asked)[0] == 0
        assert small.results(tmp_path / "disk" / "run") == small.results(finished)


def test_no_permission(small: Small, tmp_path: Path, console: Console) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    root = os.geteuid() == 0  # whom no permission stops
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(RunError, match=r"no permission to write .*run") as raised:
            pfungst.audit(small.model, small.photos, out=tmp_path / "closed" / "run", **small.settings)
        code, _, error = console("audit", small.model, small.photos, "--out", tmp_path / "closed/run", *small.flags())
    finally:
        if root:
            os.seteuid(0)
    assert code == 1
    assert message(error) == str(raised.value)
    assert raised.value.remedy == "give --out a folder of your own"
    assert not list((tmp_path / "closed").iterdir())
