"""The engine under the calling conventions of other libraries; Captum's is ``LRP.attribute``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pfungst.lrp.engine import LRP
from pfungst.lrp.presets import Preset


def quantus_explain(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    preset: str | Path | Preset = "auto",
    bounds: Any = None,
    device: Any = None,
    **settings: Any,
) -> np.ndarray:
    """Relevance as Quantus asks its ``explain_func`` for it: arrays in, an array of the inputs' shape out.

    inputs   (n, ...) array or tensor; it is taken to the model's type and device
    targets  (n,) class indices
    settings further ones of ``LRP``; Quantus hands on its ``explain_func_kwargs``
    """
    first = next(model.parameters(), None)
    x = torch.as_tensor(inputs)
    if first is not None:
        x = x.to(device=first.device if device is None else device, dtype=first.dtype)
    target = torch.as_tensor(targets).reshape(-1).long()
    scores = LRP(model, preset, bounds=bounds, **settings).attribute(x, target)
    result: np.ndarray = scores.cpu().numpy()
    return result
