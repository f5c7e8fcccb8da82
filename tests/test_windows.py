"""Sliding windows against a slow loop; pictures read by region against Pillow; pyramids against shrunken pictures."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pfungst import heatmaps
from pfungst.domains.decoding import UnreadableImage
from pfungst.domains.image import Preprocess
from pfungst.domains.large import Slide, TiledTiff, Whole, open_large
from pfungst.errors import MissingExtra, ModelError, SettingError
from pfungst.explain import explain
from pfungst.lrp import LRP
from pfungst.models import LoadedModel
from pfungst.pyramids import write_pyramid
from pfungst.windows import Windows, make_windows, mean_output, slide, window_preprocess

PREPROCESS = Preprocess((16, 20), (0.5,) * 3, (0.25,) * 3)
CLASSES = ("one", "two", "three")


def build(size: tuple[int, int] = (16, 20), **how: Any) -> LoadedModel:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 3)
    )
    return LoadedModel(module.eval(), "small", Preprocess(size, (0.5,) * 3, (0.25,) * 3, **how), CLASSES, "0" * 64)


def paint(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(paint(45, 61)).save(tmp_path / "large.png")
    return tmp_path / "large.png"


def by_loop(pixels: np.ndarray, window: tuple[int, int], stride: tuple[int, int], target: int) -> tuple[Any, ...]:
    """Every pixel asks every place whether there is a window that sees it: map, mean output, mean sum of relevance."""
    height, width = pixels.shape[:2]
    lrp = LRP(build().module)
    heat, seen, outputs, sums = np.zeros((height, width)), np.zeros((height, width)), [], []
    for top in range(height):
        for left in range(width):
            last = top + window[0] == height, left + window[1] == width
            if not ((top % stride[0] == 0 or last[0]) and (left % stride[1] == 0 or last[1])):
                continue
            if top + window[0] > height or left + window[1] > width:
                continue
            part = pixels[top : top + window[0], left : left + window[1]].astype(np.float64) / 255
            x = torch.from_numpy((part - 0.5) / 0.25).permute(2, 0, 1)[None].float()
            result = lrp(x, target=target)
            outputs.append(result.output[0].double().numpy())
            sums.append(float(result.scores.sum()))
            for y in range(window[0]):
                for z in range(window[1]):
                    heat[top + y, left + z] += float(result.scores[0, :, y, z].sum())
                    seen[top + y, left + z] += 1
    assert seen.min() >= 1
    return heat / seen, np.mean(outputs, 0), np.mean(sums), len(sums)


@pytest.mark.parametrize("stride", [(8, 10), (16, 20), (7, 13)])
def test_windows_are_those_of_a_slow_loop(picture: Path, stride: tuple[int, int]) -> None:
    model, windows = build(), Windows((16, 20), stride)
    heat, output, total, count = by_loop(paint(45, 61), (16, 20), stride, 1)
    source, told = open_large(picture), []
    assert windows.count(source.size) == count
    preprocess = window_preprocess(model.preprocess)  # type: ignore[arg-type]
    slid = slide(LRP(model.module), source, preprocess, windows, [1, 2], batch_size=5, tell=told.append)
    assert np.abs(slid.maps[0] - heat).max() < 1e-5 * np.abs(heat).max()
    assert slid.totals[0] == pytest.approx(total, rel=1e-5)
    assert sum(told) == count
    mean = mean_output(model.module, source, preprocess, windows, batch_size=4)
    assert mean.numpy() == pytest.approx(output, abs=1e-6)


def test_any_function_to_maps_can_slide(picture: Path) -> None:
    """Ones by each window: the mean over windows is one everywhere; LRP called by hand is LRP."""
    model, windows = build(), Windows((16, 20), (7, 13))
    preprocess, source = window_preprocess(model.preprocess), open_large(picture)  # type: ignore[arg-type]
    slid = slide(lambda x, targets: [x[:, 0] * 0 + t for t in targets], source, preprocess, windows, [1, 2])
    assert np.allclose(slid.maps, np.array([1, 2])[:, None, None], atol=1e-6)
    assert slid.totals == (320.0, 640.0)
    lrp = LRP(model.module)
    by_hand = slide(lambda x, targets: [lrp(x, t).scores.sum(1) for t in targets], source, preprocess, windows, [1])
    assert np.allclose(by_hand.maps, slide(lrp, source, preprocess, windows, [1]).maps, atol=1e-6)


def test_windows_of_another_size_keep_the_sum_of_relevance() -> None:
    class Constant:
        size = (30, 50)

        def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
            return Image.fromarray(paint(height, width, seed=3))

    model, windows = build(), Windows((30, 50), (30, 50))
    preprocess = window_preprocess(model.preprocess)  # type: ignore[arg-type]
    slid = slide(LRP(model.module), Constant(), preprocess, windows, [0])
    resized = Image.fromarray(paint(30, 50, seed=3)).resize((20, 16), Image.Resampling.BILINEAR)
    x = torch.from_numpy((np.asarray(resized) / 255 - 0.5) / 0.25).permute(2, 0, 1)[None].float()
    scores = LRP(model.module)(x, target=0).scores[0].sum(0).numpy()
    assert slid.maps[0].sum() == pytest.approx(scores.sum(), rel=1e-5)
    # Pixel by pixel: 16 x 20 cells cut into 240 x 100 equal parts, and these gathered into 30 x 50.
    fine = np.repeat(np.repeat(scores / (15 * 5), 15, 0), 5, 1)
    gathered = fine.reshape(30, 8, 50, 2).sum((1, 3))
    assert np.allclose(slid.maps[0], gathered, atol=1e-6 * np.abs(gathered).max())


def test_settings_of_windows_are_checked() -> None:
    assert make_windows(7, None) == Windows((7, 7), (3, 3))
    assert make_windows((6, 8), 2) == Windows((6, 8), (2, 2))
    assert Windows((5, 5), (4, 4)).starts((14, 13)) == ([0, 4, 8, 9], [0, 4, 8])
    assert Windows((5, 5), (4, 4)).count((4, 100)) == 0
    for window, stride in ((0, None), (8, 9), (8, 0), ((8, 4), 5)):
        with pytest.raises(SettingError):
            make_windows(window, stride)
    own = Preprocess((16, 20), custom=lambda image: torch.zeros(3, 16, 20))
    with pytest.raises(SettingError, match="a function"):
        window_preprocess(own)


def test_explain_writes_maps_of_the_whole_picture(picture: Path, tmp_path: Path) -> None:
    small = tmp_path / "tiny.png"
    Image.fromarray(paint(10, 61)).save(small)
    told: list[tuple[int, int]] = []
    out = tmp_path / "out"
    found, skipped = explain(
        build(), [picture, small], out, targets=["two", "predicted"], window=(16, 20), stride=(8, 10), save="npy",
        batch_size=7, quantile=1.0, progress=lambda *at: told.append(at),
    )  # fmt: skip
    heat, output, total, count = by_loop(paint(45, 61), (16, 20), (8, 10), 1)
    assert "smaller than the window of 20 x 16" in skipped.skipped
    assert found.windows == count
    one = found.targets[0]
    assert one.prediction.logit == pytest.approx(output[1], rel=1e-5)
    assert one.total == pytest.approx(total, rel=1e-5)
    assert one.absorbed == pytest.approx(1 - total / output[1], rel=1e-3)
    saved = np.load(out / str(one.relevance))
    assert saved.shape == (1, 45, 61)
    assert np.allclose(saved[0], heat, atol=1e-5 * np.abs(heat).max())
    drawn = np.asarray(Image.open(out / one.heatmap))[::4, ::4]
    assert np.abs(drawn.astype(int) - heatmaps.color(heat, one.scale)).max() <= 4
    predicted = max(range(3), key=lambda index: output[index])
    assert found.targets[-1].prediction.index == predicted
    record = json.loads((out / "explanations.json").read_text())
    assert (record["window"], record["stride"]) == ([16, 20], [8, 10])
    assert record["images"][0]["windows"] == count
    assert told[-1] == (2 * count, 2 * count) or told[-1][0] == 2 * count


def test_large_pictures_are_drawn_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pfungst.explain as module

    monkeypatch.setattr(module, "_MOST_SIDE", 25)
    monkeypatch.setattr(module, "_LEAST_SIDE", 1)
    Image.fromarray(paint(45, 61)).save(tmp_path / "a.png")
    (one,) = explain(
        build(), [tmp_path / "a.png"], tmp_path / "out", targets=1, window=(16, 20), quantile=1.0, save="npy"
    )
    heat = np.load(tmp_path / "out" / str(one.targets[0].relevance))[0]
    means = np.array([[heat[y : y + 3, x : x + 3].mean() for x in range(0, 61, 3)] for y in range(0, 45, 3)])
    drawn = np.asarray(Image.open(tmp_path / "out" / one.targets[0].heatmap)).astype(int)
    assert drawn.shape == (15, 21, 3)
    assert np.abs(drawn - heatmaps.color(means, one.targets[0].scale)).max() <= 4
    laid = np.asarray(Image.open(tmp_path / "out" / one.targets[0].overlay)).astype(int)
    expected = heatmaps.overlay(np.asarray(Image.fromarray(paint(45, 61)).reduce(3)) / 255, means)
    assert np.abs(laid - expected).max() <= 4


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_wrong_calls_and_files_are_told(picture: Path, tmp_path: Path, console: Any) -> None:
    with pytest.raises(SettingError, match="without a window"):
        explain(build(), [picture], tmp_path / "out", stride=4)
    broken = build()
    broken.module[0].weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        explain(broken, [picture], tmp_path / "out", window=16)
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "no.tif").write_bytes(b"II*\0 no picture")
    found = explain(build(), [tmp_path / "no.png", tmp_path / "no.tif"], tmp_path / "out", window=16)
    assert all(one.skipped for one in found)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n torch.manual_seed(0)\n"
        " return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))\n"
    )
    flags = ["--out", tmp_path / "cli", "--size", 12, "--window", 16, "--stride", 9, "--pyramid", tmp_path / "zoom"]
    code, _, err = console("explain", f"{tmp_path / 'net.py'}:build", picture, *flags)
    assert code == 0, err
    record = json.loads((tmp_path / "cli" / "explanations.json").read_text())["images"][0]
    assert (tmp_path / "zoom" / record["pyramid"]).exists()
    assert (tmp_path / "zoom" / record["targets"][0]["pyramid"]).exists()


# ---- pictures read by region ----------------------------------------------------------------------------------------


def as_jpeg(pixels: np.ndarray, streamtype: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling="4:2:0", streamtype=streamtype)
    return buffer.getvalue()


def write_tiff(path: Path, pixels: np.ndarray, kind: str) -> None:
    """A TIFF by hand: little-endian, one page, tiles of 64 x 32 or strips of 10 rows, by ``kind``."""
    height, width, channels = pixels.shape
    tiled, deflate, differences = "tile" in kind, "deflate" in kind, "difference" in kind
    rows, columns = (32, 64) if tiled else (10, width)
    parts, jpeg = [], "jpeg" in kind
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            part = pixels[y : y + rows, x : x + columns]
            if tiled:
                part = np.pad(part, ((0, rows - part.shape[0]), (0, columns - part.shape[1]), (0, 0)))
            if differences:
                part = np.concatenate([part[:, :1], np.diff(part, axis=1)], 1)
            if jpeg:  # without its tables, which stand in a tag
                parts.append(as_jpeg(part, streamtype=2))
            else:
                parts.append(zlib.compress(part.tobytes()) if deflate else part.tobytes())
    tags = {256: (3, [width]), 257: (3, [height]), 258: (3, [8] * channels), 259: (3, [8 if deflate else 1]),
            262: (3, [2 if channels == 3 else 1]), 277: (3, [channels]), 284: (3, [1])}  # fmt: skip
    if differences:
        tags[317] = (3, [2])
    if jpeg:
        tags |= {259: (3, [7]), 262: (3, [6]), 347: (7, list(as_jpeg(pixels[:16, :16], streamtype=1)))}
    lengths = [len(part) for part in parts]
    places = [8 + sum(lengths[:i]) for i in range(len(parts))]
    if tiled:
        tags |= {322: (3, [columns]), 323: (3, [rows]), 324: (4, places), 325: (4, lengths)}
    else:
        tags |= {278: (3, [rows]), 273: (4, places), 279: (4, lengths)}
    body = b"".join(parts) + b"\0" * (sum(lengths) % 2)
    start = 8 + len(body)
    after = start + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, (form, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{ {3: 'H', 4: 'I', 7: 'B'}[form] }", *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", after + len(more)), more + packed + b"\0" * (len(packed) % 2)
        entries += struct.pack("<HHI", tag, form, len(values)) + packed.ljust(4, b"\0")
    path.write_bytes(
        b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + more
    )


@pytest.mark.parametrize("kind", ["tile", "tile deflate", "tile deflate difference", "strip", "strip deflate"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_is_read_by_its_tiles(tmp_path: Path, kind: str, channels: int) -> None:
    pixels = paint(53, 75)[..., :channels]
    write_tiff(tmp_path / "a.tif", pixels, kind)
    with Image.open(tmp_path / "a.tif") as image:  # the hand-made file is a TIFF to others, too
        whole = np.asarray(image.convert("RGB"))
    assert np.array_equal(whole, np.broadcast_to(pixels, (53, 75, 3)))
    source = open_large(tmp_path / "a.tif")
    assert isinstance(source, TiledTiff)
    assert source.size == (53, 75)
    rng = np.random.default_rng(0)
    for _ in range(30):
        top, left = int(rng.integers(0, 53)), int(rng.integers(0, 75))
        height, width = int(rng.integers(1, 54 - top)), int(rng.integers(1, 76 - left))
        region = np.asarray(source.read(top, left, height, width))
        assert np.array_equal(region, whole[top : top + height, left : left + width])


def test_tiff_of_jpeg_tiles_and_of_other_kinds(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    smooth = np.asarray(Image.fromarray(paint(5, 7)).resize((96, 64), Image.Resampling.BICUBIC))
    write_tiff(tmp_path / "jpeg.tif", smooth, "tile jpeg")
    # RGB in JPEG, without a marker that says so: Pillow's decoder of single tiles would take it for YCbCr.
    Image.fromarray(smooth).save(tmp_path / "rgb.tif", compression="jpeg", tiffinfo={278: 16})
    Image.fromarray(smooth).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    tifffile.imwrite(tmp_path / "big.tif", smooth, tile=(32, 16), bigtiff=True, photometric="rgb")
    for name, kind in (("jpeg", TiledTiff), ("big", TiledTiff), ("lzw", (Whole, Slide)), ("rgb", (Whole, Slide))):
        source = open_large(tmp_path / f"{name}.tif")
        assert isinstance(source, kind), name
        with Image.open(tmp_path / f"{name}.tif") as image:
            whole = np.asarray(image.convert("RGB")).astype(int)
        region = np.asarray(source.read(13, 20, 40, 50)).astype(int)
        assert np.abs(region - whole[13:53, 20:70]).max() <= (2 if name == "jpeg" else 0)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, of damaged tags
def test_damaged_tiff_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", paint(53, 75), "tile deflate")
    content = (tmp_path / "a.tif").read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for number in range(60):
        broken = bytearray(content)
        start = 8 if number % 2 else len(content) - 250  # all of it, or its tags alone
        for place in rng.integers(start, len(content), 5):
            broken[place] = int(rng.integers(256))
        (tmp_path / "b.tif").write_bytes(bytes(broken[: None if number % 3 else int(rng.integers(len(content)))]))
        try:
            source = open_large(tmp_path / "b.tif")
            source.read(0, 0, min(40, source.size[0]), min(40, source.size[1]))
        except UnreadableImage as error:
            reasons.add(str(error))
    assert any("tile" in reason for reason in reasons)
    assert all(reasons)
    assert len(reasons) > 3


def test_slides_need_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(MissingExtra, match="slides"):
        open_large(tmp_path / "a.svs")


@pytest.mark.skipif(importlib.util.find_spec("openslide") is None, reason="pip install 'pfungst[slides]'")
def test_slides_are_read_through_openslide(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", paint(53, 75), "tile")
    source = Slide(tmp_path / "a.tif")
    assert source.size == (53, 75)
    assert np.array_equal(np.asarray(source.read(5, 7, 20, 30)), paint(53, 75)[5:25, 7:37])
    (tmp_path / "b.svs").write_bytes(b"no slide")
    with pytest.raises(UnreadableImage):
        open_large(tmp_path / "b.svs")


def test_memory_does_not_grow_with_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve times the pixels: the map grows by its own bytes, and little else does."""
    monkeypatch.setattr("pfungst.domains.large._KEPT", 100_000)
    model = build((32, 32))
    peaks = []
    for number, height in enumerate((512, 6144)):
        path = tmp_path / f"{number}.tif"
        write_tiff(path, np.zeros((height, 128, 3), np.uint8), "strip")
        source = open_large(path)
        how = (window_preprocess(model.preprocess), make_windows(64, 64))  # type: ignore[arg-type]
        slide(LRP(model.module), source, *how, [0])  # what is made once is not counted
        source = open_large(path)
        tracemalloc.start()
        slide(LRP(model.module), source, *how, [0])
        peaks.append(tracemalloc.get_traced_memory()[1] - 4 * height * 128)
        tracemalloc.stop()
    picture = 3 * 128 * (6144 - 512)
    assert peaks[1] - peaks[0] < 0.1 * picture, peaks


# ---- pyramids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(45, 61), (64, 64), (1, 130), (33, 32)])
def test_a_pyramid_is_the_picture_at_every_level(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = paint(*size)
    asked: list[tuple[int, ...]] = []

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        asked.append((top, left, height, width))
        return pixels[top : top + height, left : left + width]

    path = write_pyramid(tmp_path, "a", size, read, tile=16)
    root = ElementTree.parse(path).getroot()
    space = "{http://schemas.microsoft.com/deepzoom/2008}"
    assert root.tag == f"{space}Image"
    assert root.attrib == {"Format": "png", "Overlap": "0", "TileSize": "16"}
    described = root.find(f"{space}Size")
    assert described is not None
    assert described.attrib == {"Width": str(size[1]), "Height": str(size[0])}
    top = int(np.ceil(np.log2(max(size))))
    assert {p.name for p in (tmp_path / "a_files").iterdir()} == {str(level) for level in range(top + 1)}
    level = pixels.astype(float)
    for number in range(top, -1, -1):
        height, width = level.shape[:2]
        assert (height, width) == tuple(int(np.ceil(side / 2 ** (top - number))) for side in size)
        whole = np.zeros((height, width, 3))
        for tile in (tmp_path / "a_files" / str(number)).iterdir():
            column, row = map(int, tile.stem.split("_"))
            content = np.asarray(Image.open(tile))
            whole[16 * row : 16 * row + content.shape[0], 16 * column : 16 * column + content.shape[1]] = content
        assert np.abs(whole - level).max() <= (0 if number == top else 1)
        halves = [[whole[y : y + 2, x : x + 2].mean((0, 1)) for x in range(0, width, 2)] for y in range(0, height, 2)]
        level = np.array(halves)
    assert len(asked) == len(set(asked)), "each tile is asked for once"
    assert sum(one[2] * one[3] for one in asked) == size[0] * size[1]


def test_a_pyramid_replaces_its_own_kind_only(tmp_path: Path) -> None:
    def read(top: int, left: int, height: int, width: int) -> Image.Image:
        return Image.new("RGB", (width, height))

    write_pyramid(tmp_path, "a", (300, 300), read, form="jpeg")
    write_pyramid(tmp_path, "a", (3, 3), read)
    assert sorted(p.name for p in (tmp_path / "a_files").iterdir()) == ["0", "1", "2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.dzi", "a_files"]
    with pytest.raises(SettingError):
        write_pyramid(tmp_path, "a", (3, 3), read, form="gif")


def test_pyramids_of_an_explanation(picture: Path, tmp_path: Path) -> None:
    zoom = tmp_path / "zoom"
    (one,) = explain(build(), [picture], tmp_path / "out", targets=1, window=16, save="npy", pyramid=zoom, quantile=1.0)
    heat = np.load(tmp_path / "out" / str(one.targets[0].relevance))[0]
    assert one.targets[0].pyramid == "large_two_overlay.dzi"
    assert np.array_equal(
        np.asarray(Image.open(zoom / "large_two_overlay_files" / "6" / "0_0.png")),
        heatmaps.overlay(paint(45, 61) / 255, heat, one.targets[0].scale),
    )
    assert one.pyramid == "large.dzi"
    assert Image.open(zoom / "large_files" / "6" / "0_0.jpeg").size == (61, 45)


# ---- killed and gone on with ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("after", [3, 12, 27, 33, 47])
def test_what_was_done_before_a_kill_is_not_done_again(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The same bytes as without a kill, whenever it comes; the windows of finished rows are not asked again."""
    monkeypatch.setattr("pfungst.journals._EVERY", 0.0)
    how: dict[str, Any] = {"window": (16, 20), "stride": (8, 10), "save": "npy", "batch_size": 3, "targets": "top2"}
    explain(build(), [picture], tmp_path / "whole", **how)
    asked = 0

    def tell(done: int, total: int) -> None:
        nonlocal asked
        asked = done
        if kill and done >= after:
            raise Killed

    kill = True
    with pytest.raises(Killed):
        explain(build(), [picture], tmp_path / "out", progress=tell, **how)
    model, asks = build(), []
    model.module[0].register_forward_pre_hook(lambda *_: asks.append(1))
    kill = False
    explain(model, [picture], tmp_path / "out", progress=tell, **how)
    rows, columns = (len(part) for part in Windows((16, 20), (8, 10)).starts((45, 61)))
    batches = rows * -(-columns // 3)
    done = (after - 1) // columns  # rows finished before the kill, over both passes
    assert asked == 2 * rows * columns
    assert len(asks) == 2 * batches - done * -(-columns // 3)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*"))
    assert len(files) >= 7
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    assert not (tmp_path / "out" / ".windows").exists()


def test_what_was_done_with_other_settings_is_not_used(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfungst.journals._EVERY", 0.0)
    how: dict[str, Any] = {"window": (16, 20), "stride": (8, 10), "save": "npy"}

    def kill(done: int, total: int) -> None:
        if done >= 45:
            raise Killed

    for change in ("stride", "targets", "picture", "torn"):
        with pytest.raises(Killed):
            explain(build(), [picture], tmp_path / "out", targets=1, progress=kill, **how)
        targets = 2 if change == "targets" else 1
        if change == "stride":
            how["stride"] = (9, 11)
        elif change == "picture":
            Image.fromarray(paint(45, 61, seed=9)).save(picture)
        elif change == "torn":
            (state,) = (tmp_path / "out" / ".windows").rglob("state.json")
            state.write_text(state.read_text()[:40])
        (one,) = explain(build(), [picture], tmp_path / "out", targets=targets, **how)
        (two,) = explain(build(), [picture], tmp_path / "fresh", targets=targets, **how)
        assert np.array_equal(*(np.load(tmp_path / part / str(found.targets[0].relevance))
                                for part, found in (("out", one), ("fresh", two))))  # fmt: skip
