"""What notebooks show of a result: small self-contained HTML, without script, network or matplotlib.

Text takes the notebook's own colour; coloured marks have values for light and dark themes (JupyterLab, VS Code, Colab
and Sphinx say which theme they are in; the system's own setting does not tell).  All text of users is escaped, and
what cannot be drawn is said in words: showing a result never fails.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pfungst import heatmaps
from pfungst.charts import STYLE, VERDICT_COLOURS, draw_effects, write_colours
from pfungst.errors import PfungstError

_MOST_PICTURES, _MOST_ROWS, _SIDE, _BAR = 4, 8, 160, 340
_DARK = ('[data-jp-theme-light="false"]', ".vscode-dark", '[theme="dark"]', '[data-theme="dark"]')
_STYLE = (
    f".pfungst-card{{--ink:currentColor;--soft:currentColor;--line:rgba(128,128,128,.7);{write_colours('light')}}}"
    ".pfungst-card{font:14px/1.45 system-ui,sans-serif;max-width:760px;overflow-wrap:anywhere}"
    f"{','.join(f'{dark} .pfungst-card' for dark in _DARK)}{{{write_colours('dark')}}}"
    ".pfungst-card table{border-collapse:collapse;margin:6px 0;font-variant-numeric:tabular-nums}"
    ".pfungst-card th,.pfungst-card td{text-align:right;padding:2px 9px;border-bottom:1px solid rgba(128,128,128,.35)}"
    # A table that has no room is scrolled: its words stay whole, where only a single long one may break.
    ".pfungst-card table{overflow-wrap:normal}.pfungst-card .words{overflow-wrap:break-word}"
    ".pfungst-card th,.pfungst-card td:not(.words){white-space:nowrap}.pfungst-card .scroll{overflow-x:auto}"
    ".pfungst-card th:first-child,.pfungst-card td:first-child,.pfungst-card .words{text-align:left}"
    ".pfungst-card figure{display:inline-block;margin:4px 10px 4px 0;vertical-align:top;font-size:12px}"
    ".pfungst-card img{display:block;border:1px solid rgba(128,128,128,.5)}.pfungst-card p{margin:4px 0}"
    f"{STYLE}"
)


def embed_png(content: bytes) -> str:
    """The content of a PNG file as an address that stands in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def open_template(name: str) -> Any:
    """A template of a page.  All that it shows is escaped, and what it is not given is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfungst"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def show_relevance(result: Any) -> str:
    """A ``Relevance``: maps of the first samples where its input is pictures, and the balance of each sample."""
    parts, scores = [], _named(result.scores)
    for name, values in scores.items():
        shape = " x ".join(str(side) for side in values.shape)
        parts.append(f"<p>relevance{f' of {escape(name)}' if name else ''}: {shape}</p>")
        if values.ndim == 4:
            parts.append(_maps(values, name))
    rows, targets = [], _targets(result.target, len(result.explained))
    sums = np.zeros(len(result.explained))
    for one in scores.values():
        sums = sums + heatmaps.as_array(one).reshape(len(one), -1).sum(1, dtype=float)
    columns = [heatmaps.as_array(one).astype(float) for one in (result.explained, sums, result.absorbed)]
    for i, numbers in enumerate(zip(*columns, strict=True)):
        if i == _MOST_ROWS:
            break
        rows.append([str(i), targets[i], *(f"{value:.4g}" for value in numbers)])
    parts.append(_table(["sample", "target", "explained", "Σ relevance", "absorbed"], rows, len(result.explained)))
    return _card("Relevance", parts)


def show_verdict(
    record: Mapping[str, Any], needed: Collection[str], title: str = "Verdict", lines: Sequence[str] = ()
) -> str:
    """A verdict as ``evidence.describe_verdict`` writes it, with ``lines`` below; ``needed``: the tests that decide."""
    told = [f"<p>{escape(line)}</p>" for line in (record["reason"], *lines)]
    region = record["region"]
    place = f"{region['kind']} region, {region['area']:.0%} of the picture, from {escape(str(region['source']))}"
    head = f"{escape(title)} {_chip(record['verdict'])}"
    return _card(head, [*told, f"<p>{place}; p = {record['p']:.2g}</p>", _evidence(record["evidence"], needed)])


def show_finding(record: Mapping[str, Any], folder: Path, needed: Collection[str]) -> str:
    """An entry of ``findings.json`` with its ``judgements``.

    folder: the run's, which holds its pictures; needed: the tests that decide.
    """
    said = [
        f"<p><b>{escape(j['answer'])}</b>, says {escape(j['by'])}{': ' * bool(j['note'])}{escape(j['note'])}</p>"
        for j in record.get("judgements", ())
    ]
    name = record["id"]
    pictures = [
        (f"findings/{name}/mean.png", "mean relevance of its members, red for the class, blue against it", "mean"),
        *((e[key], f"{what} {e['sample']}", f"{what} {e['sample']}") for e in record["exemplars"][:3] for key, what in
          (("input", "picture"), ("overlay", "relevance of"))),
    ]  # fmt: skip
    figures = "".join(_file(folder / file, alt, caption) for file, alt, caption in pictures)
    share = f"{record['size']} pictures, {record['prevalence']:.0%} of those recognised as {record['class']}"
    head = f"{escape(name)}: class {escape(str(record['class']))} {_chip(record['verdict'])}"
    parts = [
        f"<p>{escape(record['summary'])}</p>",
        *said,
        f"<p>{escape(share)}; suspicion {record['suspicion']:.2f}</p>",
    ]
    return _card(head, [*parts, f"<div>{figures}</div>", _evidence(record["evidence"], needed)])


def show_audit(description: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """A run: its ``run.json`` and its findings, most suspicious first."""
    counts = Counter(record["verdict"] for record in records)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICT_COLOURS)
    data = description["data"]
    head = f"model {escape(description['model']['name'])} on {data['samples']} pictures of {escape(data['root'])}"
    rows = [
        [escape(one["id"]), _chip(one["verdict"]), escape(str(one["class"])), str(one["size"]),
         f"{one['suspicion']:.2f}", escape(one["where"]["place"]), escape(_judged(one))]
        for one in records
    ]  # fmt: skip
    names = ["finding", "verdict", "class", "pictures", "suspicion", "what it is about", "judged"]
    nothing = "<p>Nothing found with these settings. (That is no proof that there is no bias.)</p>"
    table = _table(names, rows, len(rows), words=(1, 2, 5, 6), ready=True) if rows else nothing
    return _card(f"Audit: {told}", [f"<p>{head}</p>", table, f"<p>{escape(str(folder))}</p>"])


def _card(head: str, parts: Iterable[str]) -> str:
    return f'<div class="pfungst-card"><style>{_STYLE}</style><p><b>{head}</b></p>{"".join(parts)}</div>'


def _chip(verdict: str) -> str:
    """A verdict in words, with its colour before it."""
    colour = f"var(--{VERDICT_COLOURS.get(verdict, 'rest')})"
    dot = f'<span aria-hidden="true" style="color:{colour}">●</span>'
    return f'<span style="white-space:nowrap">{dot} {escape(verdict)}</span>'


def _table(
    names: Sequence[str], rows: Sequence[Sequence[str]], whole: int, words: Sequence[int] = (), ready: bool = False
) -> str:
    """``ready``: the cells are HTML.  ``words``: columns of text."""
    kinds = [' class="words"' if i in words else "" for i in range(len(names))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c if ready else escape(c)}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    more = f"<p>and {whole - len(rows)} more</p>" if whole > len(rows) else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{more}'


def _evidence(evidence: Sequence[Mapping[str, Any]], needed: Collection[str]) -> str:
    """The chart of a report, and its figures."""
    if not evidence:
        return "<p>no experiment was made</p>"
    rows = [
        [e["test"], str(e["n"]), f"{e['treated']:+.2f}", f"{e['control']:+.2f}", f"{e['effect']:+.2f}",
         f"{e['interval'][0]:+.2f} to {e['interval'][1]:+.2f}", f"{e['p']:.4f}"]
        for e in evidence
    ]  # fmt: skip
    table = _table(["test", "n", "treated", "control", "effect", "95 % interval", "p"], rows, len(rows))
    return draw_effects(evidence, needed) + table


def _maps(scores: Any, name: str) -> str:
    """Maps of the first samples of (n, C, H, W) on one scale, their colour bar and what the colours mean."""
    try:
        maps = heatmaps.pool_channels(scores[:_MOST_PICTURES])
        scale = heatmaps.common_scale(maps, 0.995)
        clipped = bool(np.abs(maps).max(initial=0) > scale)
        pictures = [heatmaps.enlarge(heatmaps.color(one, scale), size=_SIDE) for one in maps]
    except PfungstError as error:
        return f"<p>no map: {escape(error.args[0])}</p>"
    of = f" of {name}" if name else ""
    figures = [
        _figure(heatmaps.encode_png(p), f"relevance{of}, sample {i}", f"sample {i}") for i, p in enumerate(pictures)
    ]
    bar = heatmaps.encode_png(heatmaps.colorbar(scale, width=_BAR, clipped=clipped))
    meaning = heatmaps.describe_scale(scale, 0.995 if clipped else 1, True)
    legend = _figure(bar, f"colour bar from {-scale:.3g} over 0 to {scale:.3g}", "", _BAR)
    return f"<div>{''.join(figures)}</div><div>{legend}</div><p>{escape(meaning)}</p>"


def _figure(content: bytes, alt: str, caption: str, width: int = _SIDE) -> str:
    image = f'<img src="{embed_png(content)}" alt="{escape(alt)}" style="width:{width}px">'
    below = f'<figcaption style="max-width:{width}px">{escape(caption)}</figcaption>' if caption else ""
    return f"<figure>{image}{below}</figure>"


def _file(path: Path, alt: str, caption: str) -> str:
    try:
        return _figure(path.read_bytes(), alt, caption, 112)
    except OSError:  # deleted since
        return ""


def _judged(record: Mapping[str, Any]) -> str:
    judgements = record.get("judgements") or ()
    return str(judgements[-1]["answer"]) if judgements else ""


def _named(scores: Any) -> dict[str, Any]:
    """Scores of one input (""), or of several by name or place; without those that get no relevance."""
    if isinstance(scores, Mapping):
        entries = {str(name): one for name, one in scores.items()}
    elif isinstance(scores, tuple | list):
        entries = {f"input {i}": one for i, one in enumerate(scores)}
    else:
        entries = {"": scores}
    return {name: one for name, one in entries.items() if one is not None}


def _targets(target: Any, count: int) -> list[str]:
    """What is explained of each sample, in a few words."""
    if getattr(target, "ndim", None) == 1 and len(target) == count:
        return [str(int(one)) for one in target]
    text = "" if target is None else repr(target)
    return [text if len(text) <= 40 else text[:37] + "..."] * count
