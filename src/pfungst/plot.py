"""Pictures for Python and notebooks with matplotlib: maps, spectra, evidence, pixel-flipping curves.

Needs ``pip install 'pfungst[plot]'``.  Every function draws on ``ax`` if it is given and on a new figure otherwise, and
returns the axes; none shows or saves a figure, or changes matplotlib's settings.  Palettes are those of ``heatmaps``:
centred on zero unless a one-sided one is asked for, and the colour bar says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfungst import heatmaps
from pfungst.charts import COLOURS
from pfungst.errors import SettingError, need
from pfungst.judgements import find_record
from pfungst.spectra import log_ratio_gaps
from pfungst.store import Run, run_of
from pfungst.strategies import find_entry

__all__ = ["evidence", "flipping", "grid", "heatmap", "overlay", "spectrum"]

# Methods differ by dash and marker as well, since no six colours are told apart by everybody.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")


def heatmap(
    relevance: Any,
    *,
    ax: Any = None,
    sample: int = 0,
    scale: float | None = None,
    quantile: float = 1.0,
    palette: str = "diverging",
    title: str | None = None,
    bar: bool = True,
) -> Any:
    """Relevance by place as colours.

    relevance  a ``Relevance``, or a tensor or array (H, W), (C, H, W) or (n, C, H, W); channels are summed
    sample     which of n
    scale      the |relevance| that gets the end colour; None: the ``quantile`` of this map's |relevance|
    palette    one of ``heatmaps.PALETTES``; ``sequential`` is for maps without negative values only

    Returns the axes.  Raises SettingError for another shape or palette, RelevanceError where a score is not finite.
    """
    scores, told = _read_map(relevance, sample)
    scale = heatmaps.common_scale([scores], quantile) if scale is None else scale
    heatmaps.color(scores, scale, palette)  # its errors, before there is a figure
    ax = _axes(ax)
    image = ax.imshow(scores, cmap=_colormap(palette), norm=_norm(scale, palette), interpolation="nearest")
    _finish_picture(ax, told if title is None else title)
    if bar:
        _add_bar(ax, image, scores, scale, palette)
    return ax


def overlay(
    picture: Any,
    relevance: Any,
    *,
    ax: Any = None,
    sample: int = 0,
    scale: float | None = None,
    quantile: float = 0.995,
    opacity: float = 0.9,
    palette: str = "diverging",
    title: str | None = None,
    bar: bool = True,
) -> Any:
    """Relevance laid over its picture (``heatmaps.overlay``); where it is zero, the desaturated picture shows.

    picture  a Pillow image, or a tensor or array (H, W, 3), (3, H, W) or (n, 3, H, W): uint8, or in [0, 1]

    The rest is as in ``heatmap``.
    """
    scores, told = _read_map(relevance, sample)
    scale = heatmaps.common_scale([scores], quantile) if scale is None else scale
    laid = heatmaps.overlay(_read_picture(picture, sample), scores, scale, opacity, palette)
    ax = _axes(ax)
    ax.imshow(laid, interpolation="nearest")
    _finish_picture(ax, told if title is None else title)
    if bar:
        from matplotlib.cm import ScalarMappable

        mappable = ScalarMappable(_norm(scale, palette), _colormap(palette))
        _add_bar(ax, mappable, scores, scale, palette)
    return ax


def grid(
    pictures: Any,
    relevance: Any = None,
    *,
    ax: Any = None,
    titles: Sequence[str] | None = None,
    most: int = 8,
    same_scale: bool = True,
    quantile: float = 0.995,
    palette: str = "diverging",
) -> Any:
    """Inputs beside their maps, a row each: input, heatmap, overlay.

    pictures    (n, 3, H, W) or a list of pictures as ``overlay`` takes them; or a ``Finding``, which has its own
                exemplars and maps (``relevance`` stays out)
    ax          axes (rows, 3) to draw on; (rows, 2) for a finding
    titles      one a row, beside the input; of a finding the samples' ids
    same_scale  one scale for all maps, so that they compare; False: each its own

    Returns the axes as an array.
    """
    if relevance is None:
        return _grid_of_finding(pictures, ax, titles, most)
    count = min(len(pictures), most)
    maps = [_read_map(relevance, i)[0] for i in range(count)]
    if titles is not None and len(titles) < count:
        raise SettingError(f"{len(titles)} titles for {count} pictures", "give one a picture")
    scales = [heatmaps.common_scale(maps if same_scale else [one], quantile) for one in maps]
    axes = _axes(ax, (count, 3))
    for i, (row, scores) in enumerate(zip(axes, maps, strict=True)):
        pixels = _read_picture(pictures[i], 0)
        row[0].imshow(pixels, interpolation="nearest")
        _finish_picture(row[0], (titles[i] if titles is not None else f"input {i}"))
        last = i == count - 1 or not same_scale
        heatmap(scores, ax=row[1], scale=scales[i], palette=palette, title="relevance" if i == 0 else "", bar=False)
        laid = "over the input" if i == 0 else ""
        overlay(pixels, scores, ax=row[2], scale=scales[i], palette=palette, title=laid, bar=False)
        if last:
            of = list(axes[:, 2]) if same_scale else row[2]
            shown = np.concatenate([one.ravel() for one in maps]) if same_scale else scores
            _add_bar(of, row[1].images[0], shown, scales[i], palette, small=not same_scale)
    return axes


def spectrum(
    source: Any, class_name: str | None = None, *, ax: Any = None, clusters: int | None = None, p: float | None = None
) -> Any:
    """Eigenvalues of a neighbour graph; coloured: the clusters chosen; dashed: the greatest log-ratio gap.

    source      a ``spectra.Spectrum``; an ``Audit``, a ``Run`` or the path of its folder, with ``class_name``; or
                eigenvalues, ascending, with ``clusters`` and, if known, ``p``
    p           how often a structureless cloud shows so great a gap
    """
    if hasattr(source, "eigenvalues"):
        values, clusters, p = source.eigenvalues, source.clusters, source.p
    elif isinstance(source, str | Path | Run) or hasattr(source, "run"):
        entry = find_entry(run_of(source), class_name, "eigenvalues", "spectrum")
        values, clusters, p = entry["eigenvalues"], entry["clusters"], entry["p"]
    else:
        values = source
    values = np.asarray(heatmaps.as_array(values), dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise SettingError(f"eigenvalues of shape {values.shape}", "give at least two, ascending")
    if clusters is None:
        raise SettingError("eigenvalues alone do not say how many clusters there are", "give clusters=")
    values = values[:12]
    ax = _axes(ax)
    colours = _colours(ax)
    kinds = [colours["accent"] if i < clusters else colours["rest"] for i in range(len(values))]
    places = np.arange(1, len(values) + 1)
    ax.bar(places, values, 0.7, color=kinds)
    ax.scatter(places, values, 30, color=kinds, zorder=3, clip_on=False)  # eigenvalues of 0 have no bar to be seen
    top = float(values.max()) or 1.0
    if len(values) > 2:
        gaps = log_ratio_gaps(values)
        told = int(gaps.argmax()) + 2
        chance = "" if p is None or math.isnan(p) else f", p = {p:.2f}"
        note = f"greatest gap: {told} | {told + 1}\n(log ratio {gaps.max():.2f}{chance})"
        at = told + 0.5
        ax.axvline(at, ls="--", lw=1, color=ax.xaxis.label.get_color())
        side = "right" if at > len(values) * 0.6 else "left"
        ax.annotate(note, (at, 0.97 * top), (-6 if side == "right" else 6, 0), textcoords="offset points", ha=side,
                    va="top", fontsize="small")  # fmt: skip
    ax.set_xticks(places)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("λ of the normalised Laplacian")
    name = f"{class_name}: " if class_name else ""
    ax.set_title(f"{name}{clusters} cluster{'s' * (clusters != 1)} (coloured)")
    return ax


def evidence(source: Any, *, ax: Any = None, title: str | None = None) -> Any:
    """A finding's interventions: control (ring), treated (dot), and the effect's 95 % interval as seen from the ring.

    An interval that does not reach its ring is an effect beyond chance.

    source  a ``Finding``, a ``Verdict`` or ``Confirmation``, an entry of ``findings.json``, or a list of ``Evidence``
    """
    record = getattr(source, "record", source)
    if callable(record):  # of a confirmation
        record = record()
    tests = record["evidence"] if isinstance(record, Mapping) else getattr(record, "evidence", record)
    rows = [asdict(one) if is_dataclass(one) and not isinstance(one, type) else dict(one) for one in tests]
    if not rows:
        raise SettingError("there is no evidence to draw", "give a finding whose interventions were made")
    ax = _axes(ax, size=(7.0, 1.4 + 0.34 * len(rows)))
    colours, ink = _colours(ax), ax.xaxis.label.get_color()
    at = np.arange(len(rows))
    control, treated = (np.array([row[key] for row in rows], dtype=float) for key in ("control", "treated"))
    ends = control[:, None] + np.array([row["interval"] for row in rows], dtype=float)
    ax.axvline(0, lw=0.8, color=ink, alpha=0.5, zorder=0)
    ax.hlines(at, ends[:, 0], ends[:, 1], lw=6, color=colours["accent"], alpha=0.35, label="95 % interval of effect")
    ax.plot(control, at, "o", mfc="none", mec=ink, ms=7, ls="none", label="control")
    ax.plot(treated, at, "o", color=colours["accent"], ms=6, ls="none", label="treated")
    ax.set_yticks(at, [f"{row['test']} (n = {row['n']})" for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("change of the class's score (logit)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), borderaxespad=0.1, ncols=3, frameon=False)
    if title is None and isinstance(record, Mapping) and "id" in record:
        title = f"{record['id']}, class {record['class']}: {record['verdict']}"
    ax.set_title(title or "", pad=28)  # the legend stands between
    return ax


def flipping(
    curves: Mapping[str, Any],
    x: Any = None,
    *,
    ax: Any = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Any:
    """Pixel-flipping curves by method: the score as more and more of the picture is flipped, most relevant first.

    curves  by method, (steps,) or (n, steps) for n samples: then the mean, with a bootstrap band over samples
    x       the share that is flipped at each step, (steps,); from 0 to 1 in equal steps by default
    level   of the band, 0 to 1; ``draws`` of the bootstrap, with ``seed``

    The legend gives the area under each mean curve over the range of x, per unit of x: the smaller, the better.
    """
    if not curves:
        raise SettingError("there are no curves", "give a mapping from the method's name to its curve")
    if not 0 < level < 1 or draws < 1:
        raise SettingError(f"level {level!r}, draws {draws!r}", "level is between 0 and 1, draws at least 1")
    read = {name: np.atleast_2d(heatmaps.as_array(one).astype(float)) for name, one in curves.items()}
    steps = next(iter(read.values())).shape[-1]
    for name, values in read.items():
        if values.ndim != 2 or values.shape[1] != steps or not values.size or not np.isfinite(values).all():
            raise SettingError(
                f"the curve {name!r} has shape {values.shape}, or values that are not finite",
                f"give (steps,) or (n, steps), with {steps} steps as the first one has",
            )
    shares = np.linspace(0, 1, steps) if x is None else np.asarray(heatmaps.as_array(x), dtype=float)
    if shares.shape != (steps,) or steps < 2 or (np.diff(shares) <= 0).any():
        raise SettingError(f"x of shape {shares.shape} for {steps} steps", "give one ascending share a step")
    ax = _axes(ax)
    colours = _colours(ax)
    for i, (name, values) in enumerate(read.items()):
        mean, colour = values.mean(0), colours[f"g{i % 6}"]
        area = float(np.trapezoid(mean, shares) / (shares[-1] - shares[0]))
        if len(values) > 1:
            ax.fill_between(shares, *_band(values, level, draws, seed), color=colour, alpha=0.2, lw=0)
        of = f", n = {len(values)}" if len(values) > 1 else ""
        ax.plot(shares, mean, color=colour, ls=_DASHES[i % 6], marker=_MARKERS[i % 6], ms=4,
                markevery=max(1, steps // 10), label=f"{name} (area {area:.3g}{of})")  # fmt: skip
    ax.set_xlabel("share flipped, most relevant first")
    ax.set_ylabel("score")
    if any(len(values) > 1 for values in read.values()):
        ax.set_title(f"mean over samples, {level:.0%} bootstrap band", fontsize="medium")
    ax.legend(frameon=False)
    return ax


def _band(values: np.ndarray, level: float, draws: int, seed: int) -> np.ndarray:
    """Lower and upper end (2, steps) of the bootstrap interval of the mean over samples (n, steps)."""
    rng = np.random.default_rng(seed)
    n = len(values)
    # How often each sample is drawn: a product with these needs no array (draws, n, steps).
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    band: np.ndarray = np.quantile(counts @ values / n, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return band


# ---- reading what is given ------------------------------------------------------------------------------------------


def _read_map(relevance: Any, sample: int) -> tuple[np.ndarray, str]:
    """Scores (H, W) of one sample, and what is known of it in words."""
    told = ""
    if hasattr(relevance, "scores") and hasattr(relevance, "explained"):
        target = relevance.target
        which = f"target {int(target[sample])}, " if getattr(target, "ndim", None) == 1 else ""
        told = f"{which}f = {float(relevance.explained[sample]):.3g}"
        relevance = relevance.scores
    if isinstance(relevance, Mapping | tuple):
        raise SettingError("the relevance of several inputs", "give one of them, such as result.scores['pixel_values']")
    values = heatmaps.as_array(relevance)
    if values.ndim == 4:
        if not -len(values) <= sample < len(values):
            raise SettingError(f"there is no sample {sample} among {len(values)}", f"give 0 to {len(values) - 1}")
        values = values[sample]
    return (heatmaps.pool_channels(values) if values.ndim == 3 else values), told


def _read_picture(picture: Any, sample: int) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1]."""
    values = heatmaps.as_array(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if values.ndim == 4:
        values = values[sample]
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3):
        raise SettingError(f"a picture of shape {values.shape}", "give (height, width, 3) or (3, height, width)")
    pixels = values / 255 if values.dtype == np.uint8 else values.astype(float)
    if pixels.size and (pixels.min() < -1e-3 or pixels.max() > 1.001):
        raise SettingError(
            f"pixels from {pixels.min():.3g} to {pixels.max():.3g}",
            "give uint8 or values in [0, 1]: of a model's input, those before mean and std",
        )
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).clip(0, 1)


def _grid_of_finding(finding: Any, ax: Any, titles: Sequence[str] | None, most: int) -> Any:
    """A finding's exemplars beside their overlays, as its run folder has them."""
    from PIL import Image

    if not hasattr(finding, "record") or not hasattr(finding, "_audit"):
        raise SettingError("pictures without relevance", "give grid(pictures, relevance), or a Finding alone")
    run = finding._audit.run
    exemplars = find_record(run, finding.record["id"])["exemplars"][:most]
    axes = _axes(ax, (len(exemplars), 2))
    for i, (row, one) in enumerate(zip(axes, exemplars, strict=True)):
        told = (titles[i] if titles is not None else one["sample"], "red for the class, blue against it" * (i == 0))
        for place, key, title in zip(row, ("input", "overlay"), told, strict=True):
            with Image.open(run.path / one[key]) as image:
                place.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
            _finish_picture(place, title)
    return axes


# ---- matplotlib -----------------------------------------------------------------------------------------------------


def _axes(ax: Any, shape: tuple[int, int] | None = None, size: tuple[float, float] | None = None) -> Any:
    """The axes given, or those of a new figure; with ``shape`` an array of them."""
    plt = need("matplotlib.pyplot", "plot", "matplotlib is not installed")
    if ax is None:
        rows, columns = shape or (1, 1)
        size = size or ((2.3 * columns + 1, 2.4 * rows + 0.3) if shape else None)
        _, made = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
        return made if shape else made[0, 0]
    if shape is None:
        return ax
    given = np.asarray(ax, dtype=object)
    if given.size != shape[0] * shape[1]:
        raise SettingError(f"{given.size} axes", f"give {shape[0]} x {shape[1]} of them")
    return given.reshape(shape)


def _colormap(palette: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(heatmaps.palette_table(palette) / 255, name=f"pfungst-{palette}")


def _norm(scale: float, palette: str) -> Any:
    from matplotlib.colors import Normalize

    end = scale or 1.0  # a map of zeros
    return Normalize(0.0 if palette in heatmaps.ONE_SIDED else -end, end)


def _add_bar(ax: Any, mappable: Any, scores: np.ndarray, scale: float, palette: str, small: bool = False) -> None:
    """A colour bar that says which kind of palette it is, and whether values lie beyond its ends."""
    one_sided = palette in heatmaps.ONE_SIDED
    beyond = bool(np.abs(scores).max(initial=0) > scale)
    extend = "neither" if not beyond else "max" if one_sided else "both"
    figure = np.ravel(np.asarray(ax, dtype=object))[0].figure
    label = f"from 0 to {scale:.2g}" if one_sided else f"centred on 0, ±{scale:.2g}"
    bar = figure.colorbar(mappable, ax=ax, extend=extend, shrink=0.9 if small else 0.8)
    bar.formatter.set_powerlimits((-2, 4))
    bar.set_label(label if small else f"relevance, {label}", fontsize="small" if small else None)


def _finish_picture(ax: Any, title: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize="medium")


def _colours(ax: Any) -> dict[str, str]:
    """The colours for the ground of these axes, light or dark."""
    from matplotlib.colors import to_rgb

    ground = ax.get_facecolor() if ax.get_facecolor()[3] > 0 else ax.figure.get_facecolor()
    return COLOURS["light" if float(np.dot(to_rgb(ground), heatmaps.LUMA)) > 0.5 else "dark"]
