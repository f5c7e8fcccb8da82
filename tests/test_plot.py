"""``pfungst.plot``: what the artists hold, in numbers; nothing of matplotlib's settings is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import check_missing
from PIL import Image
from torch import nn

import pfungst
from pfungst import heatmaps
from pfungst.charts import COLOURS
from pfungst.confirmations import Confirmation
from pfungst.errors import RelevanceError, RunError, SettingError
from pfungst.evidence import Evidence, Verdict
from pfungst.pipeline import Audit
from pfungst.regions import Region
from pfungst.spectra import measure_spectrum
from pfungst.store import Run

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex, to_rgba  # noqa: E402

from pfungst import plot  # noqa: E402

TESTS = (
    Evidence("cut:colour", 30, -3.0, -0.5, -2.5, (-3.0, -2.0), 0.0002, -0.4, 0.5, 0.1),
    Evidence("paste:same place", 40, 4.0, 1.0, 3.0, (2.5, 3.5), 0.0002, 0.4, 0.6, 0.1),
)


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="module")
def result() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return pfungst.LRP(net.eval(), "epsilon")(torch.rand(3, 3, 10, 12), target=[2, 0, 1])


def bar_of(ax: Any) -> Any:
    return next(one for one in ax.figure.axes if one.get_label() == "<colorbar>")


def test_a_heatmap_holds_the_scores_and_is_centred_on_zero(result: Any) -> None:
    ax = plot.heatmap(result, sample=1)
    scores = result.scores[1].sum(0).numpy()
    image = ax.images[0]
    assert np.array_equal(image.get_array(), scores)
    assert image.get_clim() == pytest.approx((-np.abs(scores).max(), np.abs(scores).max()))
    assert np.array_equal(
        (image.cmap(image.norm(0.0))[:3] * np.array(255)).round(), heatmaps.palette_table("diverging")[127]
    )
    # The same colours as the files of `pfungst explain` have, up to one of 255 steps.
    drawn = image.to_rgba(image.get_array(), bytes=True)[..., :3].astype(int)
    assert np.abs(drawn - heatmaps.color(scores)).max() <= 5
    assert ax.get_title() == f"target 0, f = {float(result.explained[1]):.3g}"
    assert "centred on 0" in bar_of(ax).get_ylabel()


@pytest.mark.parametrize("kind", ["tensor", "bfloat16", "array", "map", "batch"])
def test_all_kinds_of_maps_are_read(kind: str) -> None:
    tensor = torch.arange(-12.0, 12).reshape(2, 3, 4)
    given = {"tensor": tensor.requires_grad_(), "bfloat16": tensor.bfloat16(), "array": tensor.detach().numpy(),
             "map": tensor.detach().sum(0), "batch": tensor.expand(5, 2, 3, 4)}[kind]  # fmt: skip
    ax = plot.heatmap(given, sample=-1 if kind == "batch" else 0)
    assert np.array_equal(ax.images[0].get_array(), tensor.detach().sum(0).numpy())


def test_a_quantile_is_the_scale_and_the_bar_says_that_more_lies_beyond() -> None:
    scores = np.linspace(-1, 1, 400).reshape(20, 20) ** 3
    ax = plot.heatmap(scores, quantile=0.9)
    assert ax.images[0].norm.vmax == pytest.approx(np.quantile(np.abs(scores), 0.9))
    assert ax.images[0].colorbar.extend == "both"
    assert plot.heatmap(scores).images[0].colorbar.extend == "neither"
    assert plot.heatmap(scores, scale=2.0, bar=False).images[0].get_clim() == (-2, 2)


def test_one_sided_palettes_begin_at_zero_and_refuse_what_is_negative() -> None:
    scores = np.arange(12.0).reshape(3, 4)
    ax = plot.heatmap(scores, palette="sequential")
    assert ax.images[0].get_clim() == (0, 11)
    assert "from 0 to 11" in bar_of(ax).get_ylabel()
    before = plt.get_fignums()
    with pytest.raises(SettingError, match="negative scores"):
        plot.heatmap(scores - 5, palette="sequential")
    with pytest.raises(RelevanceError, match="NaN"):
        plot.heatmap(scores * np.nan)
    with pytest.raises(SettingError, match="several inputs"):
        plot.heatmap({"a": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(SettingError, match="no sample 5"):
        plot.heatmap(np.zeros((2, 3, 4, 4)), sample=5)
    assert plt.get_fignums() == before, "an error leaves no empty figure"
    assert plot.heatmap(np.zeros((3, 4))).images[0].get_clim() == (-1, 1), "a map of zeros is drawn as zero"


def test_an_overlay_is_that_of_heatmaps(result: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    scores = result.scores[0].sum(0).numpy()
    expected = heatmaps.overlay(pixels / 255, scores, heatmaps.common_scale([scores], 0.995))
    forms = [pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1).double() / 255, pixels[None]]
    for form in forms:
        ax = plot.overlay(form, result)
        assert np.array_equal(ax.images[0].get_array(), expected)
        assert bar_of(ax).get_ylim() == pytest.approx(np.array([-1, 1]) * heatmaps.common_scale([scores], 0.995))
    with pytest.raises(SettingError, match="in \\[0, 1\\]"):
        plot.overlay(torch.randn(3, 10, 12), result)


@pytest.mark.parametrize("same", [True, False])
def test_a_grid_has_inputs_beside_their_maps(result: Any, same: bool) -> None:
    pixels = torch.rand(3, 3, 10, 12)
    axes = plot.grid(pixels, result, titles=["a", "b", "c"], same_scale=same, quantile=1.0)
    assert axes.shape == (3, 3)
    maps = result.scores.sum(1).numpy()
    for i, row in enumerate(axes):
        assert row[0].get_title() == "abc"[i]
        assert np.allclose(row[0].images[0].get_array(), pixels[i].permute(1, 2, 0))
        assert np.array_equal(row[1].images[0].get_array(), maps[i])
        scale = np.abs(maps if same else maps[i]).max()
        assert row[1].images[0].get_clim() == pytest.approx((-scale, scale))
        expected = heatmaps.overlay(pixels[i].permute(1, 2, 0).double(), maps[i], float(scale))
        assert np.abs(row[2].images[0].get_array().astype(int) - expected).max() <= 1
    bars = [one for one in axes[0, 0].figure.axes if one.get_label() == "<colorbar>"]
    assert len(bars) == (1 if same else 3)


def test_axes_that_are_given_are_drawn_on(result: Any) -> None:
    figure, axes = plt.subplots(2, 3)
    number = len(plt.get_fignums())
    assert plot.heatmap(result, ax=axes[0, 0]) is axes[0, 0]
    assert plot.overlay(np.zeros((10, 12, 3)), result, ax=axes[0, 1]) is axes[0, 1]
    assert plot.spectrum([0, 0.5, 0.6], clusters=1, ax=axes[0, 2]) is axes[0, 2]
    assert plot.evidence(TESTS, ax=axes[1, 0]) is axes[1, 0]
    assert plot.flipping({"a": [1, 0]}, ax=axes[1, 1]) is axes[1, 1]
    assert len(plt.get_fignums()) == number
    with pytest.raises(SettingError, match="6 axes"):
        plot.grid(np.zeros((3, 10, 12, 3)), result, ax=axes)
    figure.canvas.draw()


def test_a_spectrum_shows_clusters_and_the_greatest_gap() -> None:
    rng = np.random.default_rng(0)
    blobs = np.concatenate([rng.normal(0, 0.1, (40, 8)) + 4 * np.eye(8)[k] for k in range(3)])
    measured = measure_spectrum(blobs, null_draws=19)
    ax = plot.spectrum(measured)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx(measured.eigenvalues[:12])
    coloured = [to_hex(bar.get_facecolor()) == COLOURS["light"]["accent"] for bar in ax.patches]
    assert coloured == [True] * 3 + [False] * 9
    assert ax.lines[0].get_xdata() == [3.5, 3.5], "between the third and the fourth"
    assert f"p = {measured.p:.2f}" in ax.texts[0].get_text()
    assert f"{measured.gap:.2f}" in ax.texts[0].get_text()
    with plt.style.context("dark_background"):
        dark = plot.spectrum([0.0, 0.1, 0.5], clusters=2)
        assert to_hex(dark.patches[0].get_facecolor()) == COLOURS["dark"]["accent"]
    with pytest.raises(SettingError, match="clusters="):
        plot.spectrum([0.0, 0.1])


@pytest.mark.parametrize("form", ["list", "verdict", "record", "confirmation"])
def test_evidence_shows_effects_as_seen_from_their_controls(form: str) -> None:
    region = Region("fixed", "pixels", 0.1)
    verdict = Verdict("confirmed", 0.001, 5.0, region, TESTS, "all work")
    record = {"id": "f001", "class": "7", "verdict": "open", "evidence": [vars(one) for one in TESTS]}
    how: dict[str, Any] = {"seed": 1, "samples": 40, "first": {}, "model": {}, "same_pictures": True}
    again = Confirmation(**vars(verdict), finding="f001", **how)
    source: Any = {"list": TESTS, "verdict": verdict, "record": record, "confirmation": again}[form]
    ax = plot.evidence(source)
    _, control, treated = ax.lines
    assert list(control.get_xdata()) == [-0.5, 1.0]
    assert list(treated.get_xdata()) == [-3.0, 4.0]
    segments = np.array(ax.collections[0].get_segments())
    assert segments[:, :, 0].tolist() == [[-3.5, -2.5], [3.5, 4.5]], "interval of the effect + the control"
    assert [one.get_text() for one in ax.get_yticklabels()] == ["cut:colour (n = 30)", "paste:same place (n = 40)"]
    assert ax.get_title() == ("f001, class 7: open" if form == "record" else "")
    with pytest.raises(SettingError, match="no evidence"):
        plot.evidence(replace(verdict, evidence=()))


def test_flipping_curves_have_their_mean_area_and_band() -> None:
    rng = np.random.default_rng(1)
    steps, x = 11, np.linspace(0, 0.5, 11)
    samples = rng.normal(5, 1, (50, 1)) * np.exp(-6 * x)
    ax = plot.flipping({"LRP": torch.from_numpy(samples), "line": 5 - 4 * x}, x, level=0.9)
    mean, line = ax.lines
    assert np.allclose(mean.get_ydata(), samples.mean(0))
    assert np.allclose(line.get_ydata(), 5 - 4 * x)
    texts = [one.get_text() for one in ax.get_legend().get_texts()]
    by_hand = sum((samples.mean(0)[i] + samples.mean(0)[i + 1]) / 2 * 0.05 for i in range(steps - 1)) / 0.5
    assert texts == [f"LRP (area {by_hand:.3g}, n = 50)", "line (area 4)"]
    assert mean.get_linestyle() != line.get_linestyle()
    assert mean.get_marker() != line.get_marker()
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    at_zero = corners[corners[:, 0] == 0, 1]
    # The plain normal interval of the mean, as an independent figure.
    half = 1.645 * samples[:, 0].std(ddof=1) / np.sqrt(50)
    assert at_zero.min() == pytest.approx(samples[:, 0].mean() - half, abs=0.06)
    assert at_zero.max() == pytest.approx(samples[:, 0].mean() + half, abs=0.06)
    again = plot.flipping({"LRP": samples}, x, level=0.9).collections[0].get_paths()[0].vertices
    assert np.array_equal(corners, again), "the same seed, the same band"
    for wrong in ({}, {"a": [1, 2], "b": [1, 2, 3]}, {"a": [1, np.nan]}):
        with pytest.raises(SettingError):
            plot.flipping(wrong)
    with pytest.raises(SettingError, match="ascending"):
        plot.flipping({"a": [1, 2]}, [1, 0])


def test_a_run_and_its_findings_are_drawn(finished: Path) -> None:
    audit = Audit(Run(finished), None)  # type: ignore[arg-type]
    finding = audit.findings[0]
    axes = plot.grid(finding)
    exemplars = finding.record["exemplars"]
    assert axes.shape == (len(exemplars), 2)
    for row, one in zip(axes, exemplars, strict=True):
        assert row[0].get_title() == one["sample"]
        for place, key in zip(row, ("input", "overlay"), strict=True):
            stored = np.asarray(Image.open(finished / one[key]).convert("RGB"))
            assert np.array_equal(place.images[0].get_array(), stored)
    for source in (audit, audit.run, finished, str(finished)):
        ax = plot.spectrum(source, "rose")
        assert ax.get_title().startswith("rose: ")
    ax = plot.evidence(finding)
    assert len(ax.lines[1].get_xdata()) == len(finding.evidence)
    assert to_rgba(ax.lines[2].get_color()) == to_rgba(COLOURS["light"]["accent"])
    with pytest.raises(RunError, match="leaf, rose"):
        plot.spectrum(audit, "tulip")
    with pytest.raises(SettingError, match="without relevance"):
        plot.grid(np.zeros((2, 3, 4, 4)))


def test_a_missing_matplotlib_is_an_error_that_names_the_command() -> None:
    check_missing("matplotlib", "plot", "pfungst.plot.heatmap(numpy.zeros((2, 2)))")
