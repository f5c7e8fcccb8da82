"""The linear nodes of a model in a few groups from input to output, and presets that give each group its own rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pfungst.errors import SettingError
from pfungst.lrp.presets import Preset, Row
from pfungst.lrp.rules import Flat, Rule

INPUT = "input"
KINDS = ("convolution", "dense")
_THIRDS = {1: ("",), 2: ("low", "high"), 3: ("low", "middle", "high")}


@dataclass(frozen=True)
class Group:
    """Some linear nodes of one kind, by name, in the order of the forward pass."""

    name: str
    kind: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class FlatUntil:
    """A choice for the input group: relevance is shared evenly from this module down (``Preset.flat_until``)."""

    layer: str

    @property
    def label(self) -> str:
        """As rules have it."""
        return f"Flat() until {self.layer}"


@dataclass(frozen=True)
class Alike:
    """A choice for the input group: the rule of the group next to it."""

    group: str

    @property
    def label(self) -> str:
        """As rules have it."""
        return f"as {self.group}"


Choice = Rule | FlatUntil | Alike


def find_groups(steps: Iterable[Any], parts: int = 3) -> tuple[Group, ...]:
    """Groups of the steps of a trace (``Trace.steps``), from input to output.

    The nodes at the input are one group; of convolutions and dense layers the kind with more nodes makes ``parts``
    consecutive groups of equal size, the other one group.  Raises SettingError where there is no linear node.
    """
    if parts < 1:
        raise SettingError(f"{parts} groups", "give 1 or more")
    nodes = [step for step in steps if step.kind in KINDS and step.rule]
    first = [step for step in nodes if step.rule.endswith(" at the input")]
    inner = {kind: [step.name for step in nodes if step.kind == kind and step not in first] for kind in KINDS}
    most = max(KINDS, key=lambda kind: len(inner[kind]))
    groups = [
        Group(INPUT if kind == first[0].kind else f"{INPUT} {kind}", kind, names)
        for kind in KINDS
        if (names := tuple(step.name for step in first if step.kind == kind))
    ]
    for kind in KINDS:
        count = min(parts, len(inner[kind])) if kind == most else min(1, len(inner[kind]))
        titles = _THIRDS.get(count) or tuple(f"{number} of {count}" for number in range(1, count + 1))
        ends = [round(i * len(inner[kind]) / max(count, 1)) for i in range(count + 1)]
        for i in range(count):
            title = f"{kind} {titles[i]}".strip()
            groups.append(Group(title, kind, tuple(inner[kind][ends[i] : ends[i + 1]])))
    if not groups:
        raise SettingError("the model has no convolution and no dense layer", "there is nothing to tune")
    return tuple(groups)


def read_choices(base: Preset, groups: Sequence[Group]) -> dict[str, Choice]:
    """What a preset without patterns for names does, group by group."""
    found: dict[str, Choice] = {}
    for group in groups:
        rule = base.rule_for(group.kind, group.name.startswith(INPUT), group.nodes[0])
        beside = neighbour(group, groups)
        alike = beside is not None and base.rule_for(beside.kind, False, beside.nodes[0]) == rule
        found[group.name] = Alike(beside.name) if alike and beside is not None else rule
    return found


def neighbour(group: Group, groups: Sequence[Group]) -> Group | None:
    """The first group of the kind of a group at the input; None for all other groups."""
    if not group.name.startswith(INPUT):
        return None
    return next((g for g in groups if g.kind == group.kind and not g.name.startswith(INPUT)), None)


def assemble(base: Preset, groups: Sequence[Group], choices: Mapping[str, Choice], name: str) -> Preset:
    """The preset that gives each group its choice, and everything else (norms, gates, attention) what ``base`` does.

    Groups of one kind that have one rule share a row; others have a row a node, by the node's name.
    """
    rows: list[Row] = []
    until: str | None = None
    settled: set[tuple[str, str | None]] = set()
    for group in groups:
        choice = choices[group.name]
        if not group.name.startswith(INPUT):
            continue
        if isinstance(choice, FlatUntil):
            until, choice = choice.layer, Flat()
        if isinstance(choice, Alike):
            found = choices[choice.group]
            assert isinstance(found, Rule)
            choice = found
        rows.append(Row(choice, group.kind, "input"))
        settled.add((group.kind, "input"))
    for kind in KINDS:
        mine = [(g, choices[g.name]) for g in groups if g.kind == kind and not g.name.startswith(INPUT)]
        rules = [(group, rule) for group, rule in mine if isinstance(rule, Rule)]
        if not rules:
            continue
        if len({rule for _, rule in rules}) == 1:
            rows.append(Row(rules[0][1], kind))
            settled.add((kind, None))
        else:
            rows += [Row(rule, kind, None, _exactly(node)) for group, rule in rules for node in group.nodes]
    rest = [row for row in base.rows if row.name is not None or (row.kind, row.position) not in settled]
    preset = replace(base, name=name, rows=(*rows, *rest))
    return preset if until is None else replace(preset.flat_until(until), name=name)


def _exactly(node: str) -> str:
    """A pattern that fits this name and no other."""
    return "".join(f"[{char}]" if char in "[*?" else char for char in node)
