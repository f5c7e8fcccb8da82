"""Maps of whole pictures by sliding windows, for any method and for the probability map."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from network import CLASS, PREPROCESS, input_bounds, to_inputs
from patches import SIZE, Picture
from PIL import Image
from torch import Tensor, nn

from pfungst.methods import CONTROLS, make_method
from pfungst.windows import Mapper, Windows, slide

# Pixels from window to window.  The probability map has one value a window, so that it needs them closer; occlusion
# costs 121 passes a window.
STRIDE = 16
STRIDES = {"probability": 8, "occlusion": 24}
OPTIONS = {"grad-cam": {"layer": "features"}, "occlusion": {"window": 8}}
OWN_CONTROLS = ("darkness",)


class Pixels:
    """A picture in memory, read by region."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.size = pixels, (pixels.shape[0], pixels.shape[1])

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        return Image.fromarray(self.pixels[top : top + height, left : left + width])


def make_map(method: str, model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """The map (H, W) of the class for a picture (H, W, 3), by sliding windows; controls see the picture whole."""
    if method == "darkness":
        return 255 - pixels.astype(np.float32).mean(2)
    if method in CONTROLS:
        return make_method(method, model)(to_inputs(pixels[None]), CLASS)[0].numpy()
    step = STRIDES.get(method, STRIDE)
    windows = Windows((SIZE, SIZE), (step, step))
    return slide(make_mapper(method, model), Pixels(pixels), PREPROCESS, windows, [CLASS], 32).maps[0]


def make_mapper(method: str, model: nn.Module) -> Mapper:
    """From windows and targets to maps.  ``probability``: the class's probability, all over the window."""
    if method == "probability":

        def ask(x: Tensor, targets: Sequence[int]) -> Iterator[Tensor]:
            with torch.no_grad():
                chances = model(x).softmax(1)
            return (chances[:, target, None, None].expand(len(x), *x.shape[2:]) for target in targets)

        return ask
    known = make_method(method, model, bounds=input_bounds(), **OPTIONS.get(method, {}))
    return lambda x, targets: [known(x, target) for target in targets]


def make_maps(method: str, model: nn.Module, pictures: Sequence[Picture], keep: Path | None = None) -> list[np.ndarray]:
    """Maps of pictures; in the folder ``keep`` those of the same network and pictures are read instead of made."""
    if keep is None:
        return [make_map(method, model, picture.pixels) for picture in pictures]
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for values in model.state_dict().values():
        digest.update(values.numpy().tobytes())
    for picture in pictures:
        digest.update(picture.pixels.tobytes())
    file = keep / f"maps_{method}_{digest.hexdigest()[:12]}.npz"
    if not file.exists():
        maps = [make_map(method, model, picture.pixels) for picture in pictures]
        keep.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".part").open("wb") as handle:
            np.savez(handle, *maps)
        file.with_suffix(".part").replace(file)
    with np.load(file) as kept:
        return [kept[f"arr_{i}"] for i in range(len(pictures))]


def detail(maps: Sequence[np.ndarray]) -> float:
    """How coarse maps are, in pixels: the lag at which their autocorrelation falls to a half, mean of both axes."""
    lags = []
    for one in maps:
        centred = one - one.mean()
        if not centred.any():
            continue
        power = np.abs(np.fft.fft2(centred, [2 * side for side in one.shape])) ** 2
        correlation = np.fft.ifft2(power).real
        for line in (correlation[: one.shape[0], 0], correlation[0, : one.shape[1]]):
            line = line / line[0]
            below = int(np.argmax(line < 0.5))
            lags.append(below - 1 + (line[below - 1] - 0.5) / (line[below - 1] - line[below]))
    return float(np.mean(lags))
