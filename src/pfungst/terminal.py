"""What commands print: progress with time left, tables of results.  Only what is asked for is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pfungst.errors import PfungstWarning


@contextmanager
def show_warnings(console: Any = None) -> Iterator[None]:
    """Warnings of ours as a user reads them, without the line of code that gave them; on standard error by default."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, PfungstWarning):
            from rich.console import Console

            out = console or Console(stderr=True)
            out.print(f"Warning: {message}", style="bold yellow", highlight=False, markup=False)
        else:
            before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PfungstWarning)
        before, warnings.showwarning = warnings.showwarning, show
        yield


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage, with the time left, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    console = Console(stderr=True)
    bars = Progress(*columns, console=console, disable=quiet)

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # no sooner: bars that were never shown leave a blank line before an error's message
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        with show_warnings(console):
            yield tell
    finally:
        if tasks:
            bars.stop()


_STYLES = {"confirmed": "bold red", "refuted": "green", "open": "yellow"}


def tabulate_findings(findings: list[Any], title: str) -> Any:
    """A table of findings: verdict, what it is about, effects of cut and paste beyond their controls."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", show_lines=True)
    for name in ("finding", "verdict", "what it is about"):
        table.add_column(name, no_wrap=name != "what it is about")
    for name in ("cut", "paste", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in findings:
        tests = {e["test"]: e for e in one.evidence}
        cut = tests.get("cut:colour") or tests["undo"]  # the second of a property of whole pictures
        pasted = tests.get("paste:same place") or tests.get("apply")
        table.add_row(
            one.id,
            f"[{_STYLES[one.verdict]}]{one.verdict}[/]",
            escape(f"class {one.record['class']}, {one.size} pictures ({one.prevalence:.0%}): {one.where['place']}"),
            f"{cut['effect']:+.1f}",
            f"{pasted['effect']:+.1f}" if pasted else "-",
            f"{pasted['flips']:.0%}" if pasted else "-",
        )
    return table


def print_findings(result: Any, title: str = "Findings that are not refuted") -> None:
    """What an audit found, and where the report is."""
    from rich.console import Console

    console = Console()
    findings = result.findings
    shown = [one for one in findings if one.verdict != "refuted"]
    if shown:
        console.print(tabulate_findings(shown, title))
        console.print(
            "cut, paste (undo, apply for whole pictures): effect on the class's score beyond the matched control; "
            "flips: pictures of other classes that it turns into this class",
            style="dim",
        )
    if findings:
        refuted = len(findings) - len(shown)
        groups = f"{len(findings)} group{'s' if len(findings) != 1 else ''}"
        console.print(f"{groups} of pictures tested, {refuted} refuted (the report shows them too).")
    else:
        console.print("Nothing found with these settings. (That is no proof that there is no bias.)")
    _print_taking_part(console, result)
    console.print(f"Report: {result.report}", soft_wrap=True, highlight=False, markup=False)


def _print_taking_part(console: Any, result: Any) -> None:
    """How many pictures are recognised, and which took no part, the unreadable ones by name."""
    from pfungst.domains.labels import shorten
    from pfungst.maps import UNREADABLE
    from pfungst.recognition import tell_recognition

    found = result.recognition
    if found is not None:
        told = f"Warning: {found.warning}" if found.warning else tell_recognition(found)
        console.print(told, style="bold yellow" if found.warning else None, highlight=False, markup=False)
    ids, aside = result.subject.data.ids, result.run.read_json("set_aside.json") or {}
    unread = {ids[row]: why for why, rows in aside.items() if why.startswith(UNREADABLE) for row in rows}
    if unread:
        told = shorten(f"{name} ({unread[name].removeprefix(UNREADABLE)})" for name in sorted(unread))
        line = f"{_count(len(unread))} could not be read: {told}"
        console.print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)
    others = sorted((-len(rows), why) for why, rows in aside.items() if not why.startswith(UNREADABLE))
    if others:
        reasons = "; ".join(f"{-number} {why}" for number, why in others)
        total = _count(-sum(number for number, _ in others))
        console.print(f"{total} of {len(ids)} took no part: {reasons}", highlight=False, markup=False)
    for note in result.subject.data.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _count(pictures: int) -> str:
    return f"{pictures} picture{'s' if pictures != 1 else ''}"


def print_confirmation(result: Any) -> None:
    """A repetition beside the first time, test by test, and what it says."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    before = {one["test"]: one for one in result.first["evidence"]}
    table = Table(
        title=f"{result.finding}, seed {result.seed}: effects beyond the control", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("test", no_wrap=True)
    for name in ("first", "again", "95 %", "p", "flips\n(control)"):  # all within 80 columns: a number cut is none
        table.add_column(name, justify="right", no_wrap=True)
    for one in result.evidence:
        old = before.get(one.test)
        table.add_row(
            one.test, f"{old['effect']:+.2f}" if old else "-", f"{one.effect:+.2f}",
            f"{one.interval[0]:+.2f} {one.interval[1]:+.2f}", "<0.001" if one.p < 0.001 else f"{one.p:.3f}",
            f"{one.flips:.0%} ({one.control_flips:.0%})",
        )  # fmt: skip
    console.print(table)
    for line in result.lines():
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_placements(placed: list[Any], run: Any, out: str | None) -> None:
    """How many new pictures share each finding of the run, and the oddest ones.

    A finding that is confirmed, or that a person called a cheat, is told even where it is in none of them.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pfungst.judgements import add_judgements, last_answer
    from pfungst.placements import find_taken_for_others
    from pfungst.reports import place_in_report

    console = Console()
    table = Table(title="Findings whose members they are like", title_justify="left")
    for name in ("finding", "verdict", "class and place", "pictures", "for example"):
        table.add_column(name, justify="right" if name == "pictures" else "left")
    records = add_judgements(run, run.read_findings()["findings"])
    for record in sorted(records, key=place_in_report):
        own, said = [one.id for one in placed if record["id"] in one.findings], last_answer(record)
        if own or record["verdict"] == "confirmed" or said == "cheat":
            place = f"{record['class']}: {record['where']['place']}"
            verdict = record["verdict"] + (f", judged {said}" if said else "")
            table.add_row(*map(escape, (record["id"], verdict, place, str(len(own)), ", ".join(own[:2]))))
    console.print(table)
    if away := find_taken_for_others(placed):
        told = ", ".join(f"{count} as {name}" for name, count in list(away.items())[:4]) + ", ..." * (len(away) > 4)
        console.print(
            f"{sum(away.values())} of {len(placed)} pictures are recognised as another class than their label "
            f"({told}), and were compared within their label's class alone: --target predicted compares them within "
            "the class that they are recognised as.",
            style="yellow", soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
    odd = sorted((one for one in placed if one.outlier is not None), key=lambda one: -one.outlier)[:5]
    console.print("Most unlike the run: " + ", ".join(f"{one.id} ({one.outlier:.1f})" for one in odd), markup=False)
    for reason in sorted({one.reason for one in placed if one.reason}):
        own = [one.id for one in placed if one.reason == reason]
        console.print(f"{len(own)} not placed, {reason}: {', '.join(own[:3])}", markup=False)
    console.print(f"{len(placed)} pictures{f': {out}' if out else ''}", markup=False)


def print_explanations(found: list[Any], out: Path) -> None:
    """How many pictures were explained, and why others were not."""
    from rich.console import Console

    console = Console()
    skipped = [one for one in found if getattr(one, "skipped", "")]
    done = len(found) - len(skipped)
    console.print(f"{_count(done)} explained in {out}", soft_wrap=True, highlight=False, markup=False)
    for one in skipped:
        line = f"  skipped {one.path}: {one.skipped}"
        console.print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)


def print_evaluation(found: Any, table: Any, page: Path) -> None:
    """The main figures of an evaluation: a row a method, controls last."""
    from rich.console import Console
    from rich.table import Table

    from pfungst.tables import write_cell, write_number

    console, marks = Console(), {"high": " ↑", "low": " ↓", "": ""}
    columns: list[tuple[str, list[str]]] = [
        (
            figure.title + marks[figure.better],
            [write_cell(table.cells[m].get(name), len(found.ids)) for m in table.methods],
        )
        for name, figure in table.figures.items()
        if figure.main
    ]
    columns.append(("s / map", [write_number(found.seconds[m]) if m in found.seconds else "" for m in table.methods]))
    names = max(map(len, table.titles.values())) + 4
    title = f"{len(found.ids)} picture{'s' * (len(found.ids) != 1)}, means"
    while columns:  # as many columns side by side as there is room for: a number that is cut is none
        width, count = names, 0
        while count < len(columns) and (not count or width + _width(columns[count]) <= console.width):
            width, count = width + _width(columns[count]), count + 1
        shown = Table(title=title, title_justify="left")
        shown.add_column("method", no_wrap=True)
        for heading, _ in columns[:count]:
            shown.add_column(heading, justify="right", no_wrap=True)
        for row, method in enumerate(table.methods):
            style = "dim" if found.kinds[method] == "control" else None
            shown.add_row(table.titles[method], *(texts[row] for _, texts in columns[:count]), style=style)
        console.print(shown)
        columns, title = columns[count:], ""
    console.print(
        "↑ higher is better, ↓ lower is better; † does not beat every control (noise, centre, edges)", style="dim"
    )
    for name, why in found.left_out.items():
        console.print(f"left out: {name}: {why}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Page: {page}", highlight=False, markup=False, soft_wrap=True)


def print_tuning(found: Any, out: str) -> None:
    """The tuned preset and the named ones on the held-back half, the rules by group, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    console, titles = Console(), {"srg": "SRG ↑", "mass": "mass ↑", "alike": "top two alike ↓"}
    shown_figures = [name for name in titles if any(name in one.figures for one in found.held)]
    table = Table(title=f"{len(found.about['held'])} held-back pictures", title_justify="left", caption_justify="left")
    table.add_column("preset", no_wrap=True)
    for name in shown_figures:
        table.add_column(titles[name], justify="right")
    table.add_column("score ↑", justify="right", no_wrap=True)
    if found.improved:
        table.add_column(f"{found.found.name} gains (95 %)", justify="right", no_wrap=True)
        table.caption = "gains: score of the tuned preset less this one's, over the same pictures"
    for one in found.held:
        gain = one.gains.get("score")
        cells = [f"{one.figures[name]:.3f}" if name in one.figures else "-" for name in shown_figures]
        told = [f"{gain[0]:+.3f} ({gain[1]:+.3f}, {gain[2]:+.3f})" if gain else ""] if found.improved else []
        table.add_row(
            one.name, *cells, f"{one.score:.3f}", *told, style="bold" if one.name == found.preset.name else None
        )
    console.print(table)
    if found.improved:
        rules = Table(title=f"Preset {found.found.name}", title_justify="left", show_header=False)
        for name, nodes in found.groups.items():
            first = nodes[0] if len(nodes) == 1 else f"{nodes[0]} to {nodes[-1]} ({len(nodes)})"
            rules.add_row(name, first, found.rules[name])
        console.print(rules)
    for line in (*found.lines(), *(f"note: {note}" for note in found.notes)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    refused = [one for one in found.tried if one.refused]
    more = f", {len(refused)} of them refused by this model" if refused else ""
    console.print(f"{len(found.tried)} presets tried{more}.", highlight=False)
    console.print(f"Preset: {out}   next: pfungst audit MODEL IMAGES --out RUN --preset {out}", soft_wrap=True,
                  highlight=False, markup=False)  # fmt: skip


def _width(column: tuple[str, list[str]]) -> int:
    return max(map(len, (column[0], *column[1]))) + 3


def print_demo(results: Any) -> None:
    """What the demo's audit found, and what of it was planted."""
    from rich.console import Console

    console = Console()
    console.print()
    print_findings(results.audit, "What the audit found (it was told nothing of the cues)")
    console.print()
    for line in results.lines():
        console.print(line, soft_wrap=True, highlight=False)
