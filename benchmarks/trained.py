"""The networks with trained weights that benchmarks share."""

from __future__ import annotations

import os
from pathlib import Path

from cifar_planted import ResNet  # the scripts beside this one
from engine import import_torchvision
from safetensors.torch import load_file
from torch import nn

DATA = Path(os.environ.get("PFUNGST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SQUEEZENET = DATA / "imagenet-models" / "squeezenet1_1_imagenet.safetensors"


def load_squeezenet() -> nn.Module:
    """SqueezeNet 1.1 trained on ImageNet: BGR, 0 to 255, less (104, 117, 123), 227 pixels."""
    model: nn.Module = import_torchvision().models.squeezenet1_1(weights=None)
    model.load_state_dict(load_file(SQUEEZENET))
    return model.eval()


def load_resnet(depth: int) -> ResNet:
    """ResNet-20, 32 or 56 trained on CIFAR-10."""
    model = ResNet((depth - 2) // 6)
    model.load_state_dict(load_file(DATA / "cifar10" / f"resnet{depth}.safetensors"))
    return model.eval()
