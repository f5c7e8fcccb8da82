"""A run folder -> one self-contained HTML file: no network, no script, opens from disk, light and dark, prints.

The report reads stored results only; it computes nothing that is not in the run folder.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pfungst.cards import embed_png, open_template
from pfungst.charts import STYLE, draw_map, write_colours
from pfungst.errors import RunError
from pfungst.facts import tell_finding, tell_spectrum
from pfungst.judgements import ANSWERS, add_judgements, last_answer, read_judgements
from pfungst.recognition import Recognition, read_recognition, tell_recognition
from pfungst.store import JUDGEMENTS, Run
from pfungst.strategies import OVERALL, SHOWN, rank_classes, read_strategies

VERDICT_ORDER = {"confirmed": 0, "open": 1, "refuted": 2}


def place_in_report(finding: Mapping[str, Any]) -> tuple[int, int]:
    """A finding's place among others: what is confirmed first, then the most suspicious."""
    return VERDICT_ORDER[finding["verdict"]], finding["rank"]


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the run folder and return its path."""
    run.read_findings()
    template = open_template("report.html")
    try:
        html = template.render(**_content(run))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pyarrow's errors are ValueErrors
        raise RunError(
            f"{run.path} is damaged: {type(error).__name__}: {error}", "give the audit another --out folder"
        ) from error
    run.write_bytes("report.html", html.encode())
    return run.path / "report.html"


def _content(run: Run) -> dict[str, Any]:
    """All that the template shows."""
    description = run.describe()
    content = run.read_findings()
    findings = sorted(add_judgements(run, content["findings"]), key=place_in_report)
    ids, aside = _samples(run)
    reasons = _set_aside(ids, aside)
    strategies = list(read_strategies(run))
    counts = Counter(f["verdict"] for f in findings)
    recognised = read_recognition(run)
    return {
        "run": description,
        "headline": write_headline(counts, recognised),
        "recognised": tell_recognition(recognised) if recognised else "",
        "warning": recognised.warning if recognised else "",
        "findings": [_finding(run, finding) for finding in findings],
        "untested": content["untested"],
        "counts": counts,
        "torn": read_judgements(run)[1],
        "judgements_file": JUDGEMENTS,
        "judged": _judged(findings),
        "classes": _classes(strategies, findings, ids),
        "class_count": len(strategies),
        "overall": run.read_json(OVERALL),
        "set_aside": reasons,
        "set_aside_total": sum(len(ids) for _, ids in reasons),
        "settings": {k: v["name"] if isinstance(v, dict) else v for k, v in description["settings"].items()},
        "colours": write_colours,
        "chart_style": STYLE,
    }


def write_headline(counts: Mapping[str, int], recognised: Recognition | None = None) -> str:
    """The run in one sentence, from the number of findings by verdict; what is wrong with it all stands before that."""
    doubt = (
        f"Only {recognised.accuracy:.0%} of the labelled pictures are recognised as their label. "
        if recognised and recognised.warning
        else ""
    )
    return doubt + _count_verdicts(counts)


def _count_verdicts(counts: Mapping[str, int]) -> str:
    confirmed = counts.get("confirmed", 0)
    if confirmed:
        plural = "s" if confirmed > 1 else ""
        return f"{confirmed} confirmed finding{plural}: the model uses {'these cues' if plural else 'this cue'}."
    if sum(counts.values()):
        return "Nothing confirmed with these settings."
    return "Nothing found with these settings."


def _judged(findings: list[dict[str, Any]]) -> str:
    """How many findings people call what, in words; "" if nobody judged."""
    last = Counter(map(last_answer, findings))
    return ", ".join(f"{last[answer]} {answer}" for answer in ANSWERS if last[answer])


def _image(run: Run, name: str) -> str:
    return embed_png((run.path / name).read_bytes())


def _photo(run: Run, name: str) -> str:
    """A photograph, as small as it gets without a visible loss: a report of 20 findings has 360 of them.

    As JPEG, or, where small pictures were enlarged and blocks of one colour make that larger, with 256 colours.
    """
    png = (run.path / name).read_bytes()
    jpeg, reduced = io.BytesIO(), io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").save(jpeg, "JPEG", quality=85, optimize=True)
        picture.convert("RGB").quantize(256).save(reduced, "PNG", optimize=True)
    if jpeg.tell() < min(len(png), reduced.tell()):
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    return embed_png(min(png, reduced.getvalue(), key=len))


def _finding(run: Run, finding: dict[str, Any]) -> dict[str, Any]:
    folder, told = f"findings/{finding['id']}", tell_finding(run, finding)
    return {
        **finding,
        **told,
        "judged": last_answer(finding),
        "drawn": {
            one["name"]: {"title": one["title"], "src": _image(run, f"{folder}/{one['name']}.png")}
            for one in told["drawn"]
        },
        "pictures": [
            {"sample": e["sample"], "input": _photo(run, e["input"]), "overlay": _photo(run, e["overlay"])}
            for e in finding["exemplars"]
        ],
        "experiment": [{**one, "src": _photo(run, f"{folder}/{one['name']}.png")} for one in told["experiment"]],
    }


def _classes(strategies: list[dict[str, Any]], findings: list[dict[str, Any]], ids: list[str]) -> list[dict[str, Any]]:
    """Spectrum and map of the classes with findings, and of some others; ``ids`` of all samples, by row."""
    by_class: dict[int, list[dict[str, Any]]] = {}
    for finding in findings:
        by_class.setdefault(finding["class_index"], []).append(finding)
    shown: list[dict[str, Any]] = []
    for entry in rank_classes(strategies):
        own = by_class.get(entry["class_index"], [])
        if not own and len(shown) >= SHOWN:
            continue
        card: dict[str, Any] = {"name": entry["class"], "n": len(entry["rows"]), "note": entry.get("note", "")}
        card["analysed"] = entry.get("analysed")
        if "x" in entry:
            # A sample of several has the colour of the first of the report, as everywhere.
            members = {sample: i for i, f in reversed(list(enumerate(own))) for sample in f["samples"]}
            drawn = [i for i, x in enumerate(entry["x"]) if x is not None]
            groups = [members.get(ids[entry["rows"][i]], -1) for i in drawn]
            x, y = ([entry[key][i] for i in drawn] for key in ("x", "y"))
            card["map"] = draw_map(x, y, groups, {i: f["id"] for i, f in enumerate(own)})
            card["spectrum"] = tell_spectrum(entry)
            there = {ids[entry["rows"][i]] for i in drawn}
            card["legend"] = [
                {"number": i % 6, "id": f["id"], "verdict": f["verdict"], "drawn": groups.count(i),
                 "size": len(there.intersection(f["samples"]))}
                for i, f in enumerate(own)
            ]  # fmt: skip
            card["best"] = max((g["suspicion"] for g in entry["groups"]), default=0.0)
        card["has_finding"] = bool(own)
        shown.append(card)
    return sorted(shown, key=lambda card: not card["has_finding"])


def _samples(run: Run) -> tuple[list[str], list[str]]:
    """Id of every sample, by row, and why it took no part in the clustering ("" if it did)."""
    import pyarrow.parquet as pq

    table = pq.read_table(run.path / "samples.parquet", columns=["id", "set_aside"]).to_pydict()
    return table["id"], table["set_aside"]


def _set_aside(ids: list[str], aside: list[str]) -> list[tuple[str, list[str]]]:
    """Reasons why samples took no part in the clustering, each with its samples."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in zip(ids, aside, strict=True):
        if reason:
            by_reason.setdefault(reason, []).append(name)
    return sorted(by_reason.items(), key=lambda item: -len(item[1]))
