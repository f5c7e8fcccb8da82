"""Pictures read ahead: threads and processes give the same, whatever is broken; errors name what died."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfungst import readers
from pfungst.domains.image import ImageData, load_batch, read_images
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import RunError

PLAIN = Preprocess(size=(20, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resize=26)
KINDS = {
    "rgb": PLAIN,
    "bgr": Preprocess(size=(20, 24), mean=(104.0, 117.0, 123.0), std=(1.0, 2.0, 3.0), channels="BGR", scale=1.0),
    "grey": Preprocess(size=(20, 24), mean=(0.4,), std=(0.2,), channels="L", crop="pad"),
    "custom": Preprocess(
        size=(9, 7), custom=lambda image: torch.full((3, 9, 7), float(np.asarray(image).mean()), requires_grad=True)
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    """70 pictures in two classes; two are broken, one has no file."""
    rng = np.random.default_rng(0)
    for i in range(70):
        target = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + i % 3, 40, 3), dtype=np.uint8)).save(target)
    (tmp_path / "pictures" / "a" / "10.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "b" / "33.png").write_bytes(b"")
    data = read_images(tmp_path / "pictures")
    data.paths[-1].unlink()
    return data


def cut(data: ImageData, size: int) -> list[np.ndarray]:
    return [np.arange(i, min(len(data), i + size)) for i in range(0, len(data), size)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_processes_give_what_threads_give(data: ImageData, kind: str) -> None:
    batches, preprocess = cut(data, 23), KINDS[kind]
    expected = list(readers._by_threads(data, preprocess, batches, 2))
    found = list(readers._by_processes(data, preprocess, batches, 2))
    assert len(found) == len(expected) == 4
    for one, other, rows in zip(found, expected, batches, strict=True):
        assert one.rows.tolist() == other.rows.tolist() == rows.tolist()
        assert one.pixels.dtype == other.pixels.dtype
        assert np.array_equal(one.pixels, other.pixels)
        assert one.ok == other.ok
        assert one.bad == other.bad
        assert repr(one.files) == repr(other.files)  # with nan: a PNG has no quantisation
        inputs, ok, bad = load_batch(data, rows, preprocess)
        assert (ok, bad) == (one.ok, one.bad)
        assert torch.equal(preprocess.to_inputs(torch.from_numpy(one.pixels)), inputs)
    assert sum(len(one.bad) for one in found) == 3


@pytest.mark.parametrize("kind", ["rgb", "bgr", "grey"])
def test_inputs_are_what_the_formula_says(data: ImageData, kind: str) -> None:
    preprocess = KINDS[kind]
    image = Image.open(data.paths[0]).convert("L" if kind == "grey" else "RGB")
    pixels = np.asarray(preprocess.fit(image), np.float32).reshape(20, 24, -1)[:, :, :: -1 if kind == "bgr" else 1]
    expected = pixels / np.float32(1 / preprocess.scale)
    expected = (expected - np.array(preprocess.mean, np.float32)) / np.array(preprocess.std, np.float32)
    found = preprocess(image)
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), expected.transpose(2, 0, 1))


def test_a_process_that_dies_is_told_with_the_remedy(data: ImageData) -> None:
    def die(image: Image.Image) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    doomed = Preprocess(size=(9, 7), custom=die)
    with pytest.raises(RunError, match=r"(?s)a process that reads pictures died.*run again.*--workers"):
        list(readers._by_processes(data, doomed, cut(data, 23), 2))


def test_processes_are_for_a_gpu_with_many_batches() -> None:
    assert readers.uses_processes(100, 8, "cuda:1")
    assert not readers.uses_processes(100, 8, "cpu")
    assert not readers.uses_processes(100, 1, "cuda")
    assert not readers.uses_processes(3, 8, "cuda")


def _running() -> dict[int, int]:
    """The parent of every process that has not ended."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = file.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(file.parent.name)] = int(parent)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_processes_end_when_their_audit_is_killed(data: ImageData) -> None:
    """Else they would wait for ever to hand over what they have read: each holds the pipe of the others."""
    code = (
        "import sys, time, numpy as np; from pfungst import readers\n"
        "from pfungst.domains.image import read_images; from pfungst.domains.preprocessing import Preprocess\n"
        "data = read_images(sys.argv[1]); batches = readers._by_processes(\n"
        "    data, Preprocess(size=(256, 256)), [np.arange(40)] * 200, 2)\n"
        "for _ in batches: print(flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, data.root], stdout=subprocess.PIPE) as audit:
        assert audit.stdout is not None
        audit.stdout.readline()
        mine = [pid for pid, parent in _running().items() if parent == audit.pid]
        assert len(mine) == 2
        time.sleep(1)  # their pipes are full by now
        audit.kill()
    end = time.monotonic() + 15
    while time.monotonic() < end and any(pid in _running() for pid in mine):
        time.sleep(0.2)
    assert not [pid for pid in mine if pid in _running()]
