"""Pictures of every kind, whole and damaged; folders and manifests; preprocessing against the libraries it follows."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from pfungst.domains.decoding import UnreadableImage, open_image
from pfungst.domains.image import ImageData, load_batch, read_images
from pfungst.domains.preprocessing import Preprocess, from_preset, from_timm
from pfungst.errors import DataError, SettingError

AS_IS = Preprocess((4, 6))


def picture(height: int = 4, width: int = 6, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colours with a little noise: what a JPEG is made for."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(9 * rows + 4 * columns), np.cos(7 * columns), np.sin(11 * rows * columns)], -1)
    noise = np.random.default_rng(1).normal(0, 4, (height, width, 3))
    return Image.fromarray((127 + 110 * waves + noise).clip(0, 255).astype(np.uint8))


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed=seed).save(path)
    return path


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path))


# --- one picture -----------------------------------------------------------------------------------------------------


def test_plain_picture_keeps_every_pixel(tmp_path: Path) -> None:
    assert np.array_equal(pixels(save(tmp_path / "a.png")), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    source = photograph(24, 32).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        from PIL import ImageCms

        rgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(source, rgb, ImageCms.createProfile("LAB"), outputMode="LAB")
        assert converted is not None
        source = converted
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "LAB") else "a.png")
    if mode == "HSV":
        source.convert("RGB").save(path)
    else:
        source.save(path)
    got = open_image(path)
    assert (got.mode, got.size) == ("RGB", (32, 24))
    if mode in ("CMYK", "P", "YCbCr"):
        difference = np.abs(np.asarray(got, float) - np.asarray(photograph(24, 32), float)).mean()
        assert difference < (25 if mode == "P" else 3)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    photograph(32, 48).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(float) - np.asarray(photograph(32, 48), float)).mean() < 6


def test_sixteen_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.repeat((ramp >> 8)[..., None], 3, -1))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(ramp[..., None], 3, -1))
    (tmp_path / "rgb.png").write_bytes(png(6, 4, 16, 2, rows))
    assert np.array_equal(pixels(tmp_path / "rgb.png"), np.repeat((ramp >> 8)[..., None], 3, -1))
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "int.tif")
    assert np.array_equal(pixels(tmp_path / "int.tif"), np.repeat((ramp >> 8)[..., None], 3, -1))
    for name, values in (("float.tif", ramp.astype(np.float32)), ("wide.tif", ramp.astype(np.int32) * 9)):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UnreadableImage, match="convert the picture to 8 or 16 bits"):
            open_image(tmp_path / name)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (6, 4), (200, 0, 0, 0))
    clear.putpixel((1, 1), (200, 0, 0, 255))
    clear.putpixel((2, 2), (0, 0, 0, 51))
    clear.save(tmp_path / "rgba.png")
    got = pixels(tmp_path / "rgba.png")
    assert got[0, 0].tolist() == [255] * 3
    assert got[1, 1].tolist() == [200, 0, 0]
    assert got[2, 2].tolist() == [204] * 3
    Image.new("LA", (6, 4), (0, 0)).save(tmp_path / "la.png")
    assert (pixels(tmp_path / "la.png") == 255).all()
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=1)
    got = pixels(tmp_path / "p.png")
    assert got[0, 0].tolist() == [10, 20, 30]
    assert got[3, 3].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # As Pillow numbers transpositions.
    exif = Image.Exif()
    exif[274] = orientation
    stored = picture()
    stored.save(tmp_path / "a.png", exif=exif)
    expected = stored if orientation == 1 else stored.transpose(Image.Transpose(undo[orientation]))
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))


def test_damaged_exif_is_no_reason_to_skip(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture()))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_big_jpegs_decode_small_and_look_the_same(tmp_path: Path) -> None:
    photograph(1600, 2400).save(tmp_path / "a.jpg", quality=92)
    preprocess = Preprocess((64, 64), resize=72)
    small, full = open_image(tmp_path / "a.jpg", 72), open_image(tmp_path / "a.jpg")
    assert full.size == (2400, 1600)
    assert small.size == (600, 400)
    difference = (preprocess(small) - preprocess(full)).abs() * 255
    assert difference.mean() < 0.5
    assert difference.max() <= 3


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A flat folder with whole pictures around every kind of damage."""
    folder = tmp_path / "damaged"
    save(folder / "a_whole.png")
    save(folder / "z_whole.png", seed=1)
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp"):
        photograph(64, 64).save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"whole.{suffix}").unlink()
        (folder / f"cut_{suffix}.{suffix}").write_bytes(data[: len(data) // 2])
        (folder / f"head_{suffix}.{suffix}").write_bytes(data[:9])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("this is no picture")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    row = b"\0" + bytes(30_000 // 8)
    (folder / "huge.png").write_bytes(png(30_000, 30_000, 1, 0, row * 30_000))
    return folder


@pytest.mark.parametrize("workers", [0, 3])
def test_damage_is_a_reported_skip(damaged: Path, workers: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    data = read_images(damaged)
    inputs, ok, skipped = load_batch(data, range(len(data)), Preprocess((4, 6)), workers)
    reasons = {data.ids[index]: reason for index, reason in skipped.items()}
    assert [data.ids[index] for index in ok] == ["a_whole.png", "z_whole.png"]
    assert len(reasons) == 16
    assert "0 bytes" in reasons["empty.jpg"]
    assert "not an image" in reasons["text.png"]
    assert "does not exist" in reasons["link.png"]
    assert "178,000,000 pixels" in reasons["huge.png"]
    assert "truncated" in reasons["cut_jpg.jpg"].lower()
    assert "truncated" in reasons["cut_png.png"].lower()
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs[1], AS_IS(picture(seed=1)))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pixel_limit_holds_where_pillow_has_none(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImage, match=r"178,000,000 pixels.*30000 x 30000"):
        open_image(damaged / "huge.png")


def test_needles_are_not_blown_up(tmp_path: Path) -> None:
    Image.new("L", (20_000, 1)).save(tmp_path / "a.png")
    _, ok, skipped = load_batch(read_images(tmp_path), [0], Preprocess((224, 224), resize=256))
    assert not ok
    assert "elongated" in skipped[0]


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="regular"):
        open_image(tmp_path / "a.png")


# --- preprocessing ---------------------------------------------------------------------------------------------------

SHAPES = [(300, 401), (401, 300), (256, 256), (232, 500), (97, 64), (1000, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["resnet50", "inception_v3", "vit_b_16", "efficientnet_b0", "swin_t"])
def test_equals_torchvision(torchvision: Any, name: str, shape: tuple[int, int]) -> None:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert torch.equal(from_preset(preset)(photograph(*shape)), preset(photograph(*shape)))


@pytest.mark.data
def test_equals_torchvision_on_a_real_picture(torchvision: Any, data_root: Path) -> None:
    image = open_image(data_root / "open-licensed-images" / "cat.png")
    preset = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    assert torch.equal(from_preset(preset)(image), preset(image))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 224, 224), (3, 192, 256)])
@pytest.mark.parametrize("percent", [0.875, 1.0])
def test_equals_timm(
    torchvision: Any, mode: str, shape: tuple[int, int], size: tuple[int, int, int], percent: float
) -> None:
    data = pytest.importorskip("timm.data")
    config = {"input_size": size, "crop_pct": percent, "crop_mode": mode, "interpolation": "bicubic"}
    config |= {"mean": (0.48, 0.45, 0.4), "std": (0.27, 0.26, 0.28)}
    expected = data.create_transform(**config, is_training=False)(photograph(*shape))
    got = from_timm(config)(photograph(*shape))
    assert got.shape == size
    assert torch.allclose(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_pixels_and_bounds(channels: str, scale: float) -> None:
    count = 1 if channels == "L" else 3
    mean, std = tuple(255 * scale * m for m in (0.4, 0.5, 0.6)[:count]), (0.2, 0.3, 0.4)[:count]
    preprocess = Preprocess((4, 6), mean, std, channels=channels, scale=scale)
    x = preprocess(picture())
    assert x.shape == preprocess.shape == (count, 4, 6)
    shown = preprocess.to_pixels(torch.stack([x, x]))
    assert shown.shape == (2, 3, 4, 6)
    grey = picture().convert("L").convert("RGB") if channels == "L" else picture()
    assert torch.allclose(shown[1].permute(1, 2, 0) * 255, torch.tensor(np.asarray(grey)).float(), atol=1e-3)
    for colour, bound in (("black", preprocess.low), ("white", preprocess.high)):
        assert bound is not None
        assert torch.equal(preprocess(Image.new("RGB", (6, 4), colour))[:, 0, 0], bound)


def test_descriptions() -> None:
    assert Preprocess((4, 6)).digest() == Preprocess((4, 6)).digest()
    assert (
        len({Preprocess((4, 6)).digest(), AS_IS.at_size((6, 4)).digest(), Preprocess((4, 6), crop="pad").digest()}) == 3
    )
    half, third = (lambda image: torch.zeros(1, 2, 2) + 0.5), (lambda image: torch.zeros(1, 2, 2) + 0.3)
    one, two = (Preprocess((2, 2), (0,), (1,), custom=custom) for custom in (half, third))
    assert one.digest() != two.digest()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 4)},
        {"resize": 0},
        {"mean": (0.5,)},
        {"std": (1, 1, 0)},
        {"mean": (0, 0, float("nan"))},
        {"crop": "centre"},
        {"interpolation": "cubic"},
        {"channels": "GBR"},
        {"scale": 0.0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Preprocess(**({"size": (4, 4)} | wrong))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("dog/2.png", "dog/1.jpg", "dog/.hidden.png", "cat/deep/er/3.PNG", ".git/x.png"):
        save(root / name)
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "owl").mkdir()
    return root


def test_folder_with_classes(classes: Path) -> None:
    data = read_images(classes)
    assert data.ids == ("cat/deep/er/3.PNG", "dog/1.jpg", "dog/2.png")
    assert data.classes == ("cat", "dog", "owl")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.labels.dtype == np.int64
    assert len(data) == 3
    assert data.notes == ("empty class: the folder owl holds no image",)
    assert data.paths[0].is_file()
    picked = data.select([2, 0])
    assert (picked.ids, picked.labels.tolist()) == (("dog/2.png", "cat/deep/er/3.PNG"), [1, 0])


def test_folder_against_the_classes_of_the_model(classes: Path) -> None:
    data = read_images(classes, ["owl", "Dog", "tabby, cat"])
    assert data.labels.tolist() == [2, 1, 1]
    assert data.classes == ("owl", "Dog", "tabby, cat")
    with pytest.raises(DataError, match="1 labels are not among the 2 classes: 'cat'") as caught:
        read_images(classes, ["dog", "horse"])
    assert "--classes" in caught.value.remedy


def test_flat_and_mixed_folders(classes: Path, tmp_path: Path) -> None:
    flat = save(tmp_path / "flat" / "a.png").parent
    (flat / "none").mkdir()
    data = read_images(flat)
    assert (data.labels.tolist(), data.classes) == ([-1], ())
    assert "none" in data.notes[0]
    assert read_images(flat, ["x"]).classes == ("x",)
    assert read_images(flat / "a.png").ids == ("a.png",)
    save(classes / "loose.png")
    mixed = read_images(classes)
    assert mixed.labels.tolist() == [0, 1, 1, -1]
    assert any("no label" in note for note in mixed.notes)


def test_link_loops_end(classes: Path) -> None:
    (classes / "dog" / "up").symlink_to(classes)
    (classes / "dog" / "self").symlink_to(classes / "dog")
    (classes / "owl" / "cats").symlink_to(classes / "cat")
    data = read_images(classes)
    assert data.ids == ("cat/deep/er/3.PNG", "dog/1.jpg", "dog/2.png", "owl/cats/deep/er/3.PNG")
    assert sum("not entered again" in note for note in data.notes) == 2


def test_names_that_are_not_text(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png")
    os.rename(source, os.fsencode(tmp_path) + b"/\xff.png")
    data = read_images(tmp_path)
    data.ids[0].encode()
    assert load_batch(data, [0], AS_IS)[1] == [0]


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "data.zip").write_bytes(b"PK")
    for path, cause in (
        (tmp_path, "holds no images"),
        (tmp_path / "x", "not exist"),
        (tmp_path / "data.zip", "neither"),
    ):
        with pytest.raises(DataError, match=cause) as caught:
            read_images(path)
        assert caught.value.remedy


# --- manifests -------------------------------------------------------------------------------------------------------


def manifest(folder: Path, text: str, name: str = "list.csv") -> Path:
    for index in range(3):
        save(folder / f"{index}.png", seed=index)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_csv(tmp_path: Path) -> None:
    path = manifest(tmp_path, "path,label,site,age\n2.png,dog,a,3\n0.png,cat,b,4\n1.png,,c,\n")
    data = read_images(path)
    assert data.ids == ("2.png", "0.png", "1.png")
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, -1]
    assert data.metadata is not None
    assert data.metadata.column_names == ["site", "age"]
    chosen = data.select(np.array([2, 0])).metadata
    assert chosen is not None
    assert chosen.column("age").to_pylist() == [None, 3]
    inputs, ok, _ = load_batch(data, [1, 0], AS_IS, workers=2)
    assert ok == [1, 0]
    assert torch.equal(inputs[0], AS_IS(picture(seed=0)))


def test_integer_labels(tmp_path: Path) -> None:
    path = manifest(tmp_path, "path,label\n2.png,10\n0.png,2\n1.png,-1\n")
    assert read_images(path).labels.tolist() == [10, 2, -1]
    assert len(read_images(path).classes) == 11
    names = [f"name{index}" for index in range(12)]
    assert read_images(path, names).labels.tolist() == [10, 2, -1]
    with pytest.raises(DataError, match="'10'"):
        read_images(path, names[:5])
    table = pa.table({"path": ["0.png", "1.png"], "label": [3.0, None]})
    parquet.write_table(table, tmp_path / "list.parquet")
    data = read_images(tmp_path / "list.parquet")
    assert (data.labels.tolist(), data.metadata) == ([3, -1], None)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("file,label\n0.png,a\n", "no column path.*'file', 'label'"),
        ("path;label\n0.png;a\n", "no column path"),
        ("path,label\n", "lists no images"),
        ("path,path\n0.png,1.png\n", "more than once"),
        ("path,label\n0.png,a\n0.png,b\n", "more than once: 0.png"),
        ("path,label\n0.png,a\n,b\n", "row 2 has no path"),
        ("path,label\n0.png,a,b\n", "cannot be read"),
        ("path,label\n0.png,123456789\n", "too great"),
        ("", "cannot be read"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        read_images(manifest(tmp_path, text))


def test_file_that_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\xff\xfe\x00" * 20)
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(DataError):
            read_images(tmp_path / name)


# --- batches and digests ---------------------------------------------------------------------------------------------


def test_order_and_threads_do_not_matter(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / f"{index:02}.png", seed=index)
    (tmp_path / "05.png").write_bytes(b"no")
    data = read_images(tmp_path)
    wanted = [7, 5, 19, 0]
    alone, threads = (load_batch(data, wanted, AS_IS, workers) for workers in (0, 4))
    assert alone[1] == threads[1] == [7, 19, 0]
    assert alone[2].keys() == {5}
    assert torch.equal(alone[0], threads[0])
    assert torch.equal(alone[0][1], AS_IS(picture(seed=19)))
    empty, ok, _ = load_batch(data, [5], AS_IS)
    assert (tuple(empty.shape), ok) == ((0, 3, 4, 6), [])


def test_failing_custom_preprocess_is_a_skip(tmp_path: Path) -> None:
    def custom(image: Image.Image) -> torch.Tensor:
        if image.width > 6:
            raise RuntimeError("only small ones")
        return torch.zeros(2, image.height, image.width)

    save(tmp_path / "a.png")
    picture(4, 9).save(tmp_path / "b.png")
    picture(5, 6).save(tmp_path / "c.png")
    preprocess = Preprocess((4, 6), (0, 0), (1, 1), custom=custom)
    _, ok, skipped = load_batch(read_images(tmp_path), [0, 1, 2], preprocess)
    assert ok == [0]
    assert "only small ones" in skipped[1]
    assert "(2, 5, 6) instead of (2, 4, 6)" in skipped[2]


def test_digest(classes: Path) -> None:
    def digest() -> str:
        return read_images(classes).digest()

    calls: list[tuple[int, int]] = []
    first = read_images(classes).digest(lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert digest() == first
    path = classes / "dog" / "2.png"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, (times.st_atime, times.st_mtime))
    changed = digest()
    path.unlink()
    removed = digest()
    data = read_images(classes)
    relabelled = ImageData(data.ids, data.paths, data.labels[::-1].copy(), data.classes, None, data.root).digest()
    assert len({first, changed, removed, relabelled}) == 4
