"""The engine explains real vision models unmodified: output unchanged, ledger closed, nothing unknown.

The fast part takes small models of every kind of architecture; ``make test-all`` takes every model of the table
``benchmarks/results/model_families.csv``, which ``benchmarks/model_families.py`` writes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import import_torchvision

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FAST = """
tv:alexnet tv:squeezenet1_1 tv:googlenet tv:resnet18 tv:shufflenet_v2_x0_5 tv:mobilenet_v3_small tv:mnasnet0_5
tv:regnet_y_400mf tv:efficientnet_b0 tv:swin_t tv:r2plus1d_18 tv:lraspp_mobilenet_v3_large
timm:test_byobnet timm:test_convnext timm:test_efficientnet timm:test_mambaout timm:test_coatnet timm:test_nfnet
timm:test_resnet timm:test_vit timm:test_vit_relpos timm:resnetv2_18 timm:resnest14d timm:skresnet18
timm:efficientvit_m0 timm:efficientvim_m1 timm:levit_128s timm:edgenext_xx_small timm:xcit_nano_12_p8_224
timm:swiftformer_xs timm:pvt_v2_b0 timm:starnet_s050 timm:ghostnet_050
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def families() -> Any:
    import_torchvision()
    pytest.importorskip("timm")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import model_families
    finally:
        sys.path.remove(str(BENCHMARKS))
    return model_families


def check(families: Any, name: str, dtype: torch.dtype) -> None:
    row = families.check(name, "auto", dtype)
    assert row.passed, row


@pytest.mark.parametrize("name", FAST)
def test_small_models(families: Any, name: str) -> None:
    check(families, name, torch.float32)


@pytest.mark.parametrize("name", [name for name in FAST if "test_" in name])
def test_small_models_in_double_precision(families: Any, name: str) -> None:
    check(families, name, torch.float64)


def table() -> list[dict[str, str]]:
    with (BENCHMARKS / "results" / "model_families.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row['model']}-{row['dtype']}")
def test_all_models(families: Any, row: dict[str, str]) -> None:
    check(families, row["model"], getattr(torch, row["dtype"]))


def test_the_table_is_of_every_model(families: Any) -> None:
    """Every classification, video and segmentation model of torchvision, and one of each of timm's modules."""
    rows = table()
    missing = {*families.torchvision_names(), *(f"timm:{name}" for name in families.TIMM)} - {r["model"] for r in rows}
    assert not missing
    assert len(families.TIMM) == 98
    assert not [row for row in rows if row["problem"]]
