"""A preset as a JSON file that people can read and write, and presets by name or file: ``preset("tuned.json")``.

::

    {
     "format": "pfungst preset", "version": 1, "name": "mine",
     "rows": [
      {"position": "input", "rule": "Flat"},
      {"kind": "convolution", "name": "features.1*", "rule": "Gamma", "gamma": 0.1},
      {"rule": "Epsilon", "epsilon": 1e-06}
     ],
     "attention": "constant", "notes": {"from": "anything"}
    }

The first row that fits a node decides, as in ``Preset``.  What is left out has its default; what is unknown, damaged or
out of range is an error that names its place.  ``notes`` are for people and have no effect.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pfungst.errors import SettingError
from pfungst.lrp.presets import PRESETS, Preset, Row
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Recurrent, Rule, WSquare, ZBox, ZPlus

FORMAT, VERSION = "pfungst preset", 1
RULES: dict[str, type[Rule]] = {
    rule.__name__: rule for rule in (Epsilon, Recurrent, AlphaBeta, ZPlus, Gamma, Pass, Flat, WSquare, ZBox)
}
_CHOICES = ("gates", "attention", "norms", "pre_activation", "max_pool")
_KNOWN = ("format", "version", "name", "rows", *_CHOICES, "even", "automatic", "notes")
_LONGEST = 2**24  # bytes: a preset of 100,000 rows is shorter


def preset(which: str | Path | Preset) -> Preset:
    """The preset of that name with its defaults, or that of a file; a Preset is returned as it is."""
    if isinstance(which, Preset):
        return which
    if is_preset_file(which):
        return read_preset(which)
    if which not in PRESETS:
        raise SettingError(
            f"there is no preset {which!r}", f"the presets are {', '.join(PRESETS)}; or give a preset file, NAME.json"
        )
    return PRESETS[str(which)]()


def is_preset_file(which: object) -> bool:
    """Whether a path is meant, not a name: it is one, or ends with ``.json``."""
    return isinstance(which, Path) or (isinstance(which, str) and which.lower().endswith(".json"))


def write_preset(preset: Preset, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write a preset as JSON, whole or not at all, replacing what is there.  ``notes``: of where it comes from.

    Raises SettingError for a rule that a file cannot hold, or where the file cannot be written.
    """
    content = {**describe_preset(preset), "notes": dict(notes or {})}
    text = _layout(content)
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SettingError(f"{target} cannot be written: {error.strerror or error}", "give another file") from error


def read_preset(path: str | Path) -> Preset:
    """The preset of a file.  Raises SettingError with the place of what is wrong in it."""
    return parse_preset(_read(Path(path)), str(path))


def read_notes(path: str | Path) -> dict[str, Any]:
    """The notes of a preset file."""
    content = _read(Path(path))
    parse_preset(content, str(path))
    return dict(content.get("notes", {}))


def describe_preset(preset: Preset) -> dict[str, Any]:
    """A preset as JSON has it; ``parse_preset`` gives an equal one back."""
    rows = [
        {**{key: getattr(row, key) for key in ("kind", "position", "name") if getattr(row, key) is not None},
         **_describe_rule(row.rule, preset.name)}
        for row in preset.rows
    ]  # fmt: skip
    even = None if preset.even is None else {"layer": preset.even[0], **_describe_rule(preset.even[1], preset.name)}
    return {
        "format": FORMAT, "version": VERSION, "name": preset.name, "rows": rows,
        **{choice: getattr(preset, choice) for choice in _CHOICES}, "even": even, "automatic": preset.automatic,
    }  # fmt: skip


def parse_preset(content: Any, where: str) -> Preset:
    """The preset of a description.  Raises SettingError, with ``where`` it stood, for anything that is no preset."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SettingError(f"{where} is no preset file", f'it needs "format": "{FORMAT}"; `pfungst tune` writes some')
    version = content.get("version")
    if version != VERSION:
        raise SettingError(f"{where} has version {version!r}", f"this pfungst reads version {VERSION}")
    _check_fields(content, _KNOWN, where)
    name, rows, automatic = content.get("name"), content.get("rows"), content.get("automatic", False)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise SettingError(f"{where}: name is {name!r}", "give a name, a word or two")
    if not isinstance(rows, list) or not isinstance(automatic, bool) or not isinstance(content.get("notes", {}), dict):
        raise SettingError(
            f"{where}: rows, automatic or notes are damaged", "they are a list, true or false, an object"
        )
    if automatic != (name.split(",")[0] == "auto") or (automatic and rows) or not (automatic or rows):
        raise SettingError(
            f"{where}: {len(rows)} rows, automatic {automatic}", "give rows, or the name auto and automatic true"
        )
    parsed = tuple(_parse_row(row, f"{where}: row {number}") for number, row in enumerate(rows, 1))
    choices = {choice: content[choice] for choice in _CHOICES if choice in content}
    even, given = None, content.get("even")
    if given is not None:
        place = f"{where}: even"
        if not isinstance(given, dict) or not isinstance(given.get("layer"), str):
            raise SettingError(f"{place} is {given!r}", 'it is null, or {"layer": "path.of.a.module", "rule": "Flat"}')
        even = given["layer"], _parse_rule(given, ("layer",), place)
        if not even[1].carries_relevance:
            raise SettingError(f"{place}: rule {even[1].label}", "it is Flat or WSquare")
    try:
        return Preset(name, parsed, even=even, automatic=automatic, **choices)
    except SettingError as error:
        raise SettingError(f"{where}: {error.args[0]}", error.remedy) from None


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST + 1)
    except FileNotFoundError:
        raise SettingError(f"there is no preset file {path}", "give the path of a file that exists") from None
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror or error}", "give another file") from error
    if len(text) > _LONGEST:
        raise SettingError(f"{path} is too long for a preset", "give a file that `pfungst tune` wrote")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path} is damaged: {error}", "restore the file; it is JSON") from None


def _layout(content: Mapping[str, Any]) -> str:
    """JSON with one line a row, so that a hundred rows can be read."""
    rows = content["rows"]
    whole = {**content, "rows": []}
    try:
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"a preset file cannot hold that: {error}", "give finite numbers, and notes as JSON"
        ) from None
    return text.replace('\n "rows": []', f'\n "rows": [\n{lines}\n ]' if rows else '\n "rows": []', 1) + "\n"


def _describe_rule(rule: Rule, name: str) -> dict[str, Any]:
    known = RULES.get(type(rule).__name__)
    if known is not type(rule):
        raise SettingError(f"preset {name!r}: rule {rule.label} is not one of pfungst's", f"give {', '.join(RULES)}")
    return {"rule": known.__name__, **{field.name: getattr(rule, field.name) for field in fields(rule)}}


def _parse_row(content: Any, where: str) -> Row:
    if not isinstance(content, dict):
        raise SettingError(f"{where} is {content!r}", 'a row is such as {"kind": "convolution", "rule": "ZPlus"}')
    rule = _parse_rule(content, ("kind", "position", "name"), where)
    kind, position, name = (content.get(key) for key in ("kind", "position", "name"))
    if name is not None and not isinstance(name, str):
        raise SettingError(f"{where}: name is {name!r}", "it is a pattern for the names of nodes, such as layer3.*")
    if not isinstance(kind, str | None) or not isinstance(position, str | None):
        raise SettingError(f"{where}: kind {kind!r}, position {position!r}", "they are words, or left out")
    try:
        return Row(rule, kind, position, name)
    except SettingError as error:
        raise SettingError(f"{where}: {error.args[0]}", error.remedy) from None


def _parse_rule(content: Mapping[str, Any], beside: tuple[str, ...], where: str) -> Rule:
    """The rule of an object, which may have the fields ``beside`` too."""
    word = content.get("rule")
    if not isinstance(word, str) or word not in RULES:
        raise SettingError(f"{where}: rule {word!r} is unknown", f"the rules are {', '.join(RULES)}")
    names = [field.name for field in fields(RULES[word])]
    _check_fields(content, ("rule", *beside, *names), where)
    numbers = {name: content[name] for name in names if name in content}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SettingError(f"{where}: {name} is {value!r}", "give a number")
    try:
        return RULES[word](**numbers)
    except SettingError as error:
        raise SettingError(f"{where}: {error.args[0]}", error.remedy) from None


def _check_fields(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [name for name in content if name not in known]
    if unknown:
        raise SettingError(f"{where}: there is no {unknown[0]!r}", f"there is {', '.join(known)}")
