"""All classes together: a cue on a few pictures of every class, which no class shows by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pfungst
from pfungst.domains.preprocessing import Preprocess


class Quarters(torch.nn.Module):
    """Class k where quarter k is bright; a bright corner speaks for all classes alike, and loudest."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = torch.nn.Conv2d(3, 2, 3, padding=1, bias=False)
        torch.nn.init.constant_(self.blur.weight, 1 / 27)
        self.preprocess = Preprocess(size=(24, 24), mean=(0.0,) * 3, std=(1.0,) * 3)  # type: ignore[assignment]
        self.classes = list("abcd")  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.blur(x))[:, 0]
        parts = [y[:, a : a + 12, b : b + 12].mean((1, 2)) for a in (0, 12) for b in (0, 12)]
        return torch.stack(parts, 1) + 6 * torch.relu(y[:, 20:, 20:].mean((1, 2)) - 0.7)[:, None]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures a class; 4 of each with a bright corner, too few to be a group of their class."""
    root = tmp_path_factory.mktemp("quarters")
    for k, label in enumerate("abcd"):
        (root / label).mkdir()
        for i in range(24):
            rng = np.random.default_rng([k, i])
            picture = rng.uniform(0, 0.2, (24, 24, 3))
            y, x = 12 * (k // 2), 12 * (k % 2)
            picture[y : y + 12, x : x + 12] += rng.uniform(0.3, 0.6)
            if i < 4:
                picture[19:, 19:] = 0.97
            Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(root / label / f"{i:02d}.png")
    return root


def test_a_cue_of_all_classes_is_told_with_its_classes(photos: Path, tmp_path: Path) -> None:
    audit = pfungst.audit(
        Quarters().eval(), photos, out=tmp_path / "run", null_draws=0, over_classes=True, max_findings=1
    )
    found: dict[str, Any] = audit.run.read_json("overall.json")
    planted = {f"{label}/{i:02d}.png" for label in "abcd" for i in range(4)}
    ids = audit.subject.data.ids
    overlaps = [
        len(planted & {ids[row] for row in group["rows"]}) / len(planted | {ids[row] for row in group["rows"]})
        for group in found["groups"]
    ]
    best = found["groups"][int(np.argmax(overlaps))]
    assert max(overlaps) > 0.8
    assert best["classes"] == {"a": 4, "b": 4, "c": 4, "d": 4}
    assert "All classes together" in audit.report.read_text()
    assert all(len(part["rows"]) >= 8 for part in found["parts"])


def test_not_asked_for(photos: Path, tmp_path: Path) -> None:
    audit = pfungst.audit(Quarters().eval(), photos, out=tmp_path / "run", null_draws=0, max_findings=1)
    assert audit.run.read_json("overall.json") is None
    assert "All classes together" not in audit.report.read_text()
