"""The settings table as options of the command line: one option a row, with its help and range of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from pfungst.settings import Settings


def setting_flags(names: set[str] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One option a row of the settings table."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for row in reversed(dataclasses.fields(Settings)):
            if names is None or row.name in names:
                function = click.option(f"--{row.name.replace('_', '-')}", row.name, **_option(row))(function)
        return function

    return decorate


def _option(row: dataclasses.Field[Any]) -> dict[str, Any]:
    meta = row.metadata
    if isinstance(row.default, bool):
        return {"is_flag": True, "default": row.default, "help": meta["help"]}
    kind: Any = str
    if meta["files"]:
        kind = _ChoiceOrFile(list(meta["choices"]))
    elif meta["choices"]:
        kind = click.Choice(list(meta["choices"]))
    elif str(row.type).startswith("int"):
        kind = int
    elif str(row.type).startswith("float"):
        kind = float
    elif meta["many"]:
        kind = _Numbers()
    told = {"show_default": True} if row.default is not None else {}
    return {"default": row.default, "type": kind, "help": meta["help"], **told}


class _ChoiceOrFile(click.Choice[str]):
    """One of the choices, or a file NAME.json."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if str(value).lower().endswith(".json") else super().convert(value, param, ctx)

    def get_metavar(self, *args: Any, **more: Any) -> str:
        return f"[{'|'.join(self.choices)}|FILE.json]"


class _Numbers(click.ParamType):
    """One number, or several separated by commas or blanks: "0.485,0.456,0.406"."""

    name = "N,N,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None or isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            return self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)
