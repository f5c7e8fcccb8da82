"""Compares pfungst with innvestigate's stored relevances of single Keras layers.

    python benchmarks/compat/innvestigate_layers.py FOLDER

FOLDER holds the HDF5 files (``tests/references/layer`` of a clone; inputs in 0 to 1, biases 0, attributions computed
in float32).  Prints the greatest difference of two entries over the greatest entry for each file; see README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor, nn

from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, WSquare, ZBox, ZPlus

# innvestigate's analysers; a preset has one rule for convolutions, another for dense layers.
ANALYSERS: dict[str, tuple[Row, ...]] = {
    "InputTimesGradient": (Row(Epsilon(0.0)),),
    "LRPZ": (Row(Epsilon(0.0)),),
    "LRPZIgnoreBias": (Row(Epsilon(0.0)),),
    "LRPEpsilon": (Row(Epsilon(1e-7)),),
    "LRPEpsilonIgnoreBias": (Row(Epsilon(1e-7)),),
    "LRPWSquare": (Row(WSquare()),),
    "LRPFlat": (Row(Flat()),),
    "LRPAlpha2Beta1": (Row(AlphaBeta(2, 1)),),
    "LRPAlpha2Beta1IgnoreBias": (Row(AlphaBeta(2, 1)),),
    "LRPAlpha1Beta0": (Row(ZPlus()),),
    "LRPAlpha1Beta0IgnoreBias": (Row(ZPlus()),),
    "LRPZPlus": (Row(ZPlus()),),
    "LRPZPlusFast": (Row(ZPlus()),),
    "LRPZ_boxed_input_layer_rule": (Row(ZBox()),),
    "LRPZ_Flat_input_layer_rule": (Row(Flat()),),
    "LRPSequentialPresetA": (Row(ZPlus(), "convolution"), Row(Epsilon(0.1))),
    "LRPSequentialPresetB": (Row(AlphaBeta(2, 1), "convolution"), Row(Epsilon(0.1))),
    "LRPSequentialPresetAFlat": (Row(Flat(), position="input"),),
    "LRPSequentialPresetBFlat": (Row(Flat(), position="input"),),
    "DeepTaylor": (Row(ZPlus()),),
    "BoundedDeepTaylor": (Row(ZBox()),),
}


class Layer(nn.Module):
    """A layer on (n, channels, rows, columns) whose values are flattened as Keras has them, channels last."""

    def __init__(self, name: str, group: Any) -> None:
        super().__init__()
        self.kind, self.relu = name.removesuffix("_relu"), name.endswith("_relu")
        if "Pooling" in self.kind:
            self.node: nn.Module = nn.MaxPool2d(2) if self.kind == "MaxPooling2D" else nn.AvgPool2d(2)
            return
        weight, bias = (torch.from_numpy(group["weights"][key][()]).double() for key in "01")
        dense = self.kind == "Dense"
        self.node = nn.Linear(3, 5) if dense else nn.Conv2d(3, 5, 3)
        self.node.weight.data = weight.T if dense else weight.permute(3, 2, 0, 1)  # type: ignore[operator, union-attr]
        self.node.bias.data = bias  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = self.node(x.movedim(1, -1)) if self.kind == "Dense" else self.node(x).movedim(1, -1)
        return (y.relu() if self.relu else y).flatten(1)


def main() -> None:
    """One line a file: the greatest difference, and at which layer."""
    for path in sorted(Path(sys.argv[1]).glob("*.hdf5")):
        if path.stem not in ANALYSERS:
            print(f"{path.stem:32} not LRP")
            continue
        preset = Preset("innvestigate", ANALYSERS[path.stem])
        with h5py.File(path) as file:
            x = torch.from_numpy(file["input"][()]).movedim(-1, 1)
            differences = {}
            ends = (-128, 128) if path.stem == "BoundedDeepTaylor" else (-10, 10)
            for name in [name for name in file if name != "input"]:
                scores = LRP(Layer(name, file[name]).double(), preset, bounds=ends)(x).scores
                theirs = torch.from_numpy(file[name]["attribution"][()]).double().movedim(-1, 1)
                differences[name] = float((scores - theirs).abs().max() / theirs.abs().max())
        agree = sum(value < 1e-5 for value in differences.values())
        worst = max(differences, key=differences.__getitem__)
        print(f"{path.stem:32} {agree} of {len(differences)} layers agree; {differences[worst]:.1e} at {worst}")


if __name__ == "__main__":
    main()
