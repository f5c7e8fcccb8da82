"""From a picture to the input of a model, and back to a picture for display.

A ``Preprocess`` is data (sizes, mean, deviation, order of channels), so that a run can write it down and compare it.
Only a model that brings its own callable makes an exception; its code is named by a digest then.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import numpy as np
import torch
from PIL import Image

from pfungst.errors import ModelError, SettingError
from pfungst.heatmaps import LUMA

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPS = ("center", "squash", "pad")
CHANNELS = ("RGB", "BGR", "L")
SIZE_REMEDY = "give --size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 (size=, mean=, std=) as in its training"
# A picture of 1 x 10,000 pixels whose short side becomes 256 would take 2 GB: refused, not computed.
MAX_RESIZED_PIXELS = 50_000_000


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input: resize, crop, ``(pixel * scale - mean) / std``, channels first.

    ``size``: (height, width) of the input.  ``mean``, ``std``: one a channel, in the model's order of channels.
    ``resize``: short side, or (height, width), before the crop; None: see ``crop``.
    ``crop``: ``center`` keeps the proportions, covers ``resize`` (None: no resize at all) and cuts ``size`` from the
    middle, with black where the picture is smaller; ``squash`` resizes to (height, width) ``resize`` (None:
    ``size``) whatever the shape and cuts ``size`` from the middle; ``pad`` fits the whole picture into ``resize``
    (None: ``size``) and fills ``size`` up with the mean colour.
    ``scale``: what a pixel of 0 to 255 is multiplied with first.
    ``custom``: the model's own callable, upright RGB picture -> float tensor (C, H, W), which replaces all of that;
    ``mean`` and ``std`` then only say how many channels there are.

    Raises SettingError where the numbers make no sense.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: int | tuple[int, int] | None = None
    crop: str = "center"
    interpolation: str = "bilinear"
    channels: str = "RGB"
    scale: float = 1 / 255
    custom: Callable[[Image.Image], torch.Tensor] | None = None
    measured_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("crop", CROPS), ("interpolation", tuple(INTERPOLATIONS)), ("channels", CHANNELS)):
            if getattr(self, name) not in allowed:
                raise SettingError(f"{name} is {getattr(self, name)!r}", f"use one of {', '.join(allowed)}")
        resize = self.resize if isinstance(self.resize, tuple) else (1 if self.resize is None else self.resize,)
        if len(self.size) != 2 or any(side < 1 for side in (*self.size, *resize)):
            raise SettingError(f"size {self.size} or resize {self.resize} is not positive", "give --size 224")
        count = len(self.mean) if self.custom else (1 if self.channels == "L" else 3)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != count:
                raise SettingError(
                    f"{name} has {len(values)} values for {count} channels ({self.channels})",
                    f"give one value a channel, as in --{name} " + " ".join(["0.5"] * count),
                )
            if not all(math.isfinite(value) for value in values):
                raise SettingError(f"{name} {values} is not finite", f"give finite numbers for --{name}")
        if any(value <= 0 for value in self.std) or not (math.isfinite(self.scale) and self.scale > 0):
            raise SettingError(f"std {self.std} or scale {self.scale} is not positive", "give numbers above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input."""
        return len(self.mean), *self.size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The input (C, H, W), float32, of one upright RGB picture.

        Raises ValueError where this picture cannot be used: too elongated to resize, or the model's own callable
        gave another shape than for other pictures, or numbers that are not finite.
        """
        return self.to_inputs(torch.from_numpy(self.to_array(image))[None])[0]

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of what ``to_array`` gives: (H, W, C), or (C, H, W) of a ``custom`` callable."""
        return self.shape if self.custom is not None else (*self.size, len(self.mean))

    @property
    def array_type(self) -> type[np.generic]:
        """Type of what ``to_array`` gives: bytes, or float32 of a ``custom`` callable."""
        return np.uint8 if self.custom is None else np.float32

    def to_array(self, image: Image.Image) -> np.ndarray:
        """All that differs from picture to picture, in as few bytes as it takes: the pixels of the resized picture,
        in the model's order of channels; what a ``custom`` callable returns.  Errors as for a call."""
        if self.custom is not None:
            result = _checked(self.custom(image))
            if tuple(result.shape) != self.shape:
                raise ValueError(f"the model's preprocess gave {tuple(result.shape)} instead of {self.shape}")
            return result.numpy()
        image = self.fit(image.convert("L" if self.channels == "L" else "RGB"))
        pixels = np.array(image, dtype=np.uint8).reshape(self.array_shape)
        return np.ascontiguousarray(pixels[:, :, ::-1]) if self.channels == "BGR" else pixels

    def to_inputs(self, arrays: torch.Tensor) -> torch.Tensor:
        """The inputs (n, C, H, W), float32, of pictures (n, ...) from ``to_array``, on the device where they are."""
        if self.custom is not None:
            return arrays
        inputs = arrays.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
        # Division by 255 in float32, as torchvision does: the last bit agrees.  By a tensor: a GPU multiplies by the
        # reciprocal of a plain number.
        numbers = (np.float32(1 / self.scale), *(np.asarray(v, np.float32) for v in (self.mean, self.std)))
        whole, mean, std = (torch.as_tensor(v, device=inputs.device).view(-1, 1, 1) for v in numbers)
        return inputs.div_(whole).sub_(mean).div_(std)

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture resized, cropped and padded to ``size``, still in pixels.  Not for ``custom``."""
        height, width = self.resized(image.height, image.width)
        if height * width > MAX_RESIZED_PIXELS:
            raise ValueError(f"too elongated: {image.width} x {image.height} would become {width} x {height}")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        if (height, width) == self.size:
            return image
        top, left = (_offset(have, want) for have, want in zip((height, width), self.size, strict=True))
        if top < 0 or left < 0:
            canvas = Image.new(image.mode, self.size[::-1], self._fill())
            canvas.paste(image, (-left, -top))
            return canvas
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size has after the resize, before the crop."""
        target = self.resize
        if self.crop == "center" and target is None:
            return height, width
        if self.crop == "center" and isinstance(target, int):
            short = min(height, width)
            return target * height // short, target * width // short
        box = self.size if target is None else (target, target) if isinstance(target, int) else target
        if self.crop == "squash":
            return box
        ratios = (height / box[0], width / box[1])
        ratio = max(ratios) if self.crop == "pad" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def window(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Top, left, bottom and right edge of the input in a picture of this size, in the picture's pixels.

        Edges lie outside the picture where it is padded.  Not for ``custom``.
        """
        resized = self.resized(height, width)
        scale = height / resized[0], width / resized[1]
        top, left = (_offset(have, want) for have, want in zip(resized, self.size, strict=True))
        bottom, right = top + self.size[0], left + self.size[1]
        return top * scale[0], left * scale[1], bottom * scale[0], right * scale[1]

    def _fill(self) -> Any:
        if self.crop != "pad":
            return 0
        colour = [min(255, max(0, round(value / self.scale))) for value in self.mean]
        if self.channels == "L":
            return colour[0]
        return tuple(colour[::-1] if self.channels == "BGR" else colour)

    @property
    def low(self) -> torch.Tensor | None:
        """Smallest value (C,) an input can have: pixel 0.  None for ``custom`` until it is measured."""
        return self._bound(0)

    @property
    def high(self) -> torch.Tensor | None:
        """Greatest value (C,) an input can have: pixel 255.  None for ``custom`` until it is measured."""
        return self._bound(1)

    def _bound(self, side: int) -> torch.Tensor | None:
        if self.measured_range is not None:
            return torch.tensor(self.measured_range[side])
        if self.custom is not None:
            return None
        # The same float32 arithmetic as for a picture, so that no input can lie outside by a rounding error.
        pixel = np.float32(255 * side) / np.float32(1 / self.scale)
        return torch.from_numpy((pixel - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)).float()

    def measured(self, low: Sequence[float] | torch.Tensor, high: Sequence[float] | torch.Tensor) -> Preprocess:
        """A copy that knows the range (C,), (C,) of its inputs, found by looking at the data."""
        bounds = tuple(tuple(float(value) for value in side) for side in (low, high))
        if any(len(side) != len(self.mean) for side in bounds):
            raise SettingError(f"a range of {len(bounds[0])} values for {len(self.mean)} channels")
        return replace(self, measured_range=(bounds[0], bounds[1]))

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """The picture (..., 3, H, W), RGB in 0 to 1, that the input (..., C, H, W) shows.

        Of a ``custom`` callable whose range is not measured, each picture is stretched from its own least to its own
        greatest value; other channel counts than 1 and 3 are shown as their mean, in grey.
        """
        x = x.detach().float()
        column = (-1, 1, 1)
        if self.custom is None:
            mean, std = (torch.tensor(v, device=x.device).view(column) for v in (self.mean, self.std))
            pixels = (x * std + mean) / (self.scale * 255)
        else:
            if self.low is not None and self.high is not None:
                low, high = self.low.to(x.device).view(column), self.high.to(x.device).view(column)
            else:
                low, high = x.amin((-3, -2, -1), keepdim=True), x.amax((-3, -2, -1), keepdim=True)
            pixels = (x - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        if pixels.shape[-3] not in (1, 3):
            pixels = pixels.mean(-3, keepdim=True)
        if pixels.shape[-3] == 1:
            pixels = pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
        elif self.channels == "BGR":
            pixels = pixels.flip(-3)
        return pixels.clamp(0, 1)

    def from_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The input (..., C, H, W) that shows these pixels (..., 3, H, W), RGB in 0 to 1: ``to_pixels`` turned round.

        Of a ``custom`` callable the range must be measured, and there must be 1 or 3 channels.
        """
        column = (-1, 1, 1)
        if self.channels == "BGR":
            pixels = pixels.flip(-3)
        if len(self.mean) == 1:
            weights = torch.tensor(LUMA, device=pixels.device).view(column)
            pixels = (pixels * weights).sum(-3, keepdim=True)
        if self.custom is None:
            mean, std = (torch.tensor(v, device=pixels.device).view(column) for v in (self.mean, self.std))
            return (pixels * (self.scale * 255) - mean) / std
        if self.low is None or self.high is None or len(self.mean) not in (1, 3):
            raise SettingError("the model's own preprocess is a function: pixels cannot be turned into inputs")
        low, high = self.low.to(pixels.device).view(column), self.high.to(pixels.device).view(column)
        return low + pixels * (high - low)

    def describe(self) -> dict[str, Any]:
        """What a run writes down: JSON-able, and another after a change of ``custom``'s code."""
        if self.custom is not None:
            return {"custom": _describe_callable(self.custom), "shape": list(self.shape)}
        return {
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "channels": self.channels,
            "scale": self.scale,
        }

    def digest(self) -> str:
        """sha256 (hex) of ``describe()``."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def at_size(self, size: tuple[int, int]) -> Preprocess:
        """The same for another input size; the resize keeps its proportion to the crop."""
        if self.custom is not None:
            raise SettingError("the model's own preprocess is a function: its size cannot be changed")
        resize = self.resize
        if isinstance(resize, int):
            resize = round(resize * min(size) / min(self.size))
        elif resize is not None:
            resize = (round(resize[0] * size[0] / self.size[0]), round(resize[1] * size[1] / self.size[1]))
        return replace(self, size=size, resize=resize)


def from_description(record: dict[str, Any]) -> Preprocess | None:
    """The Preprocess that ``describe`` wrote down; None for a model's own callable, which no file holds."""
    if "custom" in record:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Preprocess(**fields)


def from_callable(custom: Callable[[Image.Image], torch.Tensor]) -> Preprocess:
    """Preprocess around a model's own callable; a test picture tells the shape of its inputs.

    Raises ModelError where the callable fails on the picture, gives no float tensor (C, H, W), or is random.
    """
    ramp = np.linspace(0, 255, 320 * 240 * 3).astype(np.uint8).reshape(240, 320, 3)
    remedy = "`preprocess` takes an upright RGB PIL image and returns a float tensor (C, H, W)"
    try:
        first, second = (_checked(custom(Image.fromarray(ramp))) for _ in range(2))
    except Exception as error:
        raise ModelError(f"the model's own preprocess fails: {type(error).__name__}: {error}", remedy) from error
    if not torch.equal(first, second):
        raise ModelError(
            "the model's own preprocess is random: one picture gave two different inputs",
            "use the transforms of evaluation, without augmentation",
        )
    channels, height, width = first.shape
    return Preprocess((height, width), (0.0,) * channels, (1.0,) * channels, custom=custom)


def from_preset(preset: Any) -> Preprocess:
    """Preprocess of an object with crop_size, resize_size, mean and std, as torchvision's weights have."""

    def sides(value: Any) -> int | tuple[int, int]:
        if isinstance(value, int):
            return value
        return int(value[0]) if len(value) == 1 else (int(value[0]), int(value[1]))

    crop, resize = sides(preset.crop_size), sides(preset.resize_size)
    mode = getattr(preset, "interpolation", "bilinear")
    return Preprocess(
        size=(crop, crop) if isinstance(crop, int) else crop,
        mean=tuple(float(value) for value in preset.mean),
        std=tuple(float(value) for value in preset.std),
        resize=resize,
        crop="squash" if isinstance(resize, tuple) else "center",
        interpolation=str(getattr(mode, "value", mode)),
    )


def from_timm(config: dict[str, Any]) -> Preprocess:
    """Preprocess of a timm data configuration (input_size, crop_pct, crop_mode, interpolation, mean, std)."""
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        raise ModelError(f"the model takes {channels} channels, and pictures have 1 or 3", "use another model")
    # timm divides first and floors after; the order decides about a pixel.
    box = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    mode = config.get("crop_mode") or "center"
    interpolation = config.get("interpolation") or "bilinear"
    return Preprocess(
        size=(height, width),
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
        resize=box[0] if mode == "center" and box[0] == box[1] else box,
        crop={"center": "center", "squash": "squash", "border": "pad"}[mode],
        interpolation="bilinear" if interpolation == "random" else interpolation,
        channels="L" if channels == 1 else "RGB",
    )


def from_transformers(settings: dict[str, Any]) -> Preprocess | None:
    """Preprocess of an image processor of transformers (preprocessor_config.json); None if it does something else.

    Without ``do_center_crop`` pictures are resized to ``size`` whatever their shape; with ``crop_pct`` (ConvNeXt) the
    short side becomes size / crop_pct first, for sizes below 384.
    """

    def sides(value: Any) -> tuple[int, int] | None:
        if isinstance(value, int):
            return value, value
        known = isinstance(value, dict) and {"height", "width"} <= value.keys()
        return (int(value["height"]), int(value["width"])) if known else None

    size: Any = settings.get("size")
    box, short = sides(size), size.get("shortest_edge") if isinstance(size, dict) else None
    resize: int | tuple[int, int] | None = box if short is None else int(short)
    crop = "squash" if short is None else "center"
    if settings.get("do_center_crop"):
        box, crop = sides(settings.get("crop_size", size)), crop if settings.get("do_resize", True) else "center"
    elif short is not None and settings.get("crop_pct"):
        box, small = (int(short), int(short)), short < 384
        resize, crop = (int(short / settings["crop_pct"]), "center") if small else (box, "squash")
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 2))
    if box is None or interpolation is None or settings.get("do_pad"):
        return None
    plain = not settings.get("do_normalize", True)
    return Preprocess(
        size=box,
        mean=(0.0,) * 3 if plain else tuple(float(value) for value in settings["image_mean"]),
        std=(1.0,) * 3 if plain else tuple(float(value) for value in settings["image_std"]),
        resize=resize if settings.get("do_resize", True) else None,
        crop=crop,
        interpolation=interpolation,
        scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
    )


def override(
    own: Preprocess | None,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str | None = None,
) -> Preprocess:
    """A model's own preprocessing with what the user says in its place.

    ``mean``, ``std``: one a channel, or one for all, of pixels in 0 to 1; any value above 1 says that they are of
    pixels in 0 to 255.  Without a preprocessing of its own, ``size`` resizes the short side and crops the middle.

    Raises ModelError where neither the model nor ``size`` says how large an input is; SettingError where the values
    do not go together.
    """
    if own is not None and all(value is None for value in (size, mean, std, channels)):
        return own
    both = (size, size) if isinstance(size, int) else size
    stated = own is not None and own.custom is None
    if own is None or own.custom is not None:
        if both is None:
            whose = "does not say" if own is None else "has a function of its own, so these flags alone cannot say"
            raise ModelError(f"the model {whose} how its input is made from a picture", SIZE_REMEDY)
        if channels is not None and channels not in CHANNELS:
            raise SettingError(f"channels is {channels!r}", f"use one of {', '.join(CHANNELS)}")
        order = channels or "RGB"
        count = 1 if order == "L" else 3
        resize = both[0] if both[0] == both[1] else both
        own = Preprocess(both, (0.0,) * count, (1.0,) * count, resize=resize, channels=order)
    elif both is not None and both != own.size:
        own = own.at_size(both)
    if channels is not None and channels != own.channels:
        own = _reorder(own, channels, mean is not None and std is not None)
    if mean is None and std is None:
        return own
    means, deviations = (_per_channel(value, len(own.mean), name) for value, name in ((mean, "mean"), (std, "std")))
    large = any(abs(value) > 1 for value in (*(means or ()), *(deviations or ())))
    scale = 1.0 if large else 1 / 255
    if stated and scale != own.scale and (means is None or deviations is None):
        raise SettingError(
            f"mean and std are of pixels in 0 to {255 * scale:.0f}, the model's own of 0 to {255 * own.scale:.0f}",
            "give both --mean and --std",
        )
    return replace(own, mean=means or own.mean, std=deviations or own.std, scale=scale)


def _reorder(own: Preprocess, channels: str, replaced: bool) -> Preprocess:
    """The same colours' means in another order of channels."""
    if channels not in CHANNELS:
        raise SettingError(f"channels is {channels!r}", f"use one of {', '.join(CHANNELS)}")
    count = 1 if channels == "L" else 3
    if count == len(own.mean):
        return replace(own, channels=channels, mean=own.mean[::-1], std=own.std[::-1])
    if not replaced and (len(set(own.mean)) > 1 or len(set(own.std)) > 1):
        raise SettingError(
            f"the model's mean and std are of {own.channels}, the channels are to be {channels}",
            "give --mean and --std too, one value a channel",
        )
    return replace(own, channels=channels, mean=own.mean[:1] * count, std=own.std[:1] * count)


def _per_channel(value: Sequence[float] | float | None, count: int, name: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        values = (float(value),) if isinstance(value, (int, float)) else tuple(float(part) for part in value)
    except (TypeError, ValueError):
        raise SettingError(f"{name} is {value!r}", "give a number, or one number a channel") from None
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise SettingError(f"--{name} has {len(values)} values for {count} channels", "give one a channel")
    return values


def _checked(result: Any) -> torch.Tensor:
    if not isinstance(result, torch.Tensor) or result.ndim != 3 or not result.is_floating_point():
        found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(f"the model's preprocess gave {found}, not a float tensor (C, H, W)")
    if not bool(torch.isfinite(result).all()):
        raise ValueError("the model's preprocess gave numbers that are not finite")
    return result.detach().float().cpu()


def _offset(have: int, want: int) -> int:
    # torchvision rounds a crop half to even, and puts the odd pixel of a padding behind.
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def _describe_callable(custom: Callable[..., Any]) -> dict[str, str]:
    function = inspect.unwrap(custom)
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):
        source = ""
    # Values that the code reads from elsewhere decide as well; addresses would differ from run to run.
    cells = [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    # Two lambdas on one line have one source, and other constants and names.
    code = getattr(function, "__code__", None)
    constants = [repr(value) for value in getattr(code, "co_consts", ()) if not isinstance(value, CodeType)]
    names = list(getattr(code, "co_names", ()))
    state = [repr(function), repr(getattr(function, "__defaults__", None)), *cells, *constants, *names]
    if not inspect.isroutine(function):
        state += sorted(f"{key}={value!r}" for key, value in getattr(function, "__dict__", {}).items())
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join([source, *state]))
    return {
        "name": f"{getattr(named, '__module__', '')}.{named.__qualname__}",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
