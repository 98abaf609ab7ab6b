"""Flags, derived from the options that methods, targets and builds declare (`vtexport.options`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import click
import cloup

from vtexport.options import Option, OptionField, option_fields

Command = Callable[..., Any]


def of_class(owner: type, *names: str) -> list[Command]:
    """Flags for the options that `owner` declares: all, or those in `names`."""
    declared = option_fields(owner)
    return [_flag(declared[name], {}, everywhere=True) for name in names or declared]


def of_classes(classes: Mapping[str, type]) -> list[Command]:
    """Flags for all options that `classes` declare, each once; its help names the classes that have it."""
    fields: dict[str, OptionField] = {}
    owners: dict[str, dict[str, Option]] = {}
    declared = [(name, option) for name, owner in classes.items() for option in option_fields(owner).values()]
    for name, option in declared:
        if not option.extra.get("resolved"):
            known = fields.setdefault(option.name, option)
            choices = tuple(dict.fromkeys((*known.choices, *option.choices)))
            fields[option.name] = replace(known, choices=choices)
            owners.setdefault(option.name, {})[name] = option.default
    return [_flag(field, owners[name], everywhere=len(owners[name]) == len(classes)) for name, field in fields.items()]


def given(values: Mapping[str, Any], owners: Iterable[type]) -> dict[str, Any]:
    """Those of `values` that were given on the command line and belong to an option of `owners`."""
    names = {name for owner in owners for name in option_fields(owner)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _flag(field: OptionField, owners: Mapping[str, Option], *, everywhere: bool) -> Command:
    """The flag of `field`; `owners` are the classes that have it, with their defaults; `everywhere`: all have it."""
    text = _help(field, owners, everywhere)
    if field.kind is bool:
        spelling = f"{field.flag}/--no-{field.flag[2:]}" if field.default else field.flag
        return cloup.option(spelling, field.name, is_flag=True, default=None, help=text)
    words = [choice for choice in field.choices if choice] or list(field.extra.get("names", ()))

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    # Values are checked where the option is declared, so that the command line and Python give the same error.
    return cloup.option(field.flag, field.name, metavar=_metavar(field), help=text, shell_complete=complete)


def _metavar(field: OptionField) -> str:
    if "metavar" in field.extra:
        return str(field.extra["metavar"])
    choices = "|".join(choice for choice in field.choices if choice)
    return choices or {int: "NUMBER", float: "NUMBER"}.get(field.kind, "TEXT")


def _help(field: OptionField, owners: Mapping[str, Option], everywhere: bool) -> str:
    """What an option does, for whom, and its default."""
    text = field.help if everywhere else f"{field.help} For {', '.join(owners)}."
    shown = field.extra.get("default", _shown(field.default))
    if "default" not in field.extra:
        for other in dict.fromkeys(value for value in owners.values() if value != field.default):
            names = ", ".join(name for name, value in owners.items() if value == other)
            shown += f"; {_shown(other)} for {names}"
    return f"{text}  [default: {shown}]" if shown else text


def _shown(value: Option) -> str:
    if isinstance(value, bool):
        return "on" if value else ""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
