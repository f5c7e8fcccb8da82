"""What tests share: the real data, and torchvision where it was built without its compiled operators."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
_LIBRARIES: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """torchvision, or a skip.  A build for another torch lacks two operators that its import asks for: they are
    declared here, never called by what we test."""
    if not _LIBRARIES and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # The operators live as long as the object.
    return pytest.importorskip("torchvision")


@pytest.fixture(scope="session")
def torchvision() -> Any:
    return import_torchvision()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data and trained models; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("PFUNGST_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set PFUNGST_DATA")
    return root
