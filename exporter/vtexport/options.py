"""Options, declared once: annotated fields of the class that owns them, such as a pruning method or a target.

    @dataclass(frozen=True)
    class VisPruner(VisionMethod):
        important: Annotated[float, Meta(ge=0, le=1, description="Share that is kept by attention.")] = 0.5

The command line's flags and their help, the checks, the manifest's entries and the tables in docs/ all derive from such
a field: its name, its type (`Literal` for one of a few words), its range, its default and its description. `Meta` is
msgspec's. Its `extra` may hold `metavar`, the word that help shows in place of a value; `default`, the default as help
shows it; `names`, words for shell completion; and `resolved`, True for a field that a build fills in and no user gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from vtexport.errors import InputError

__all__ = ["Meta", "Option", "OptionField", "flag_of", "option_fields", "option_values", "parse_options", "validate"]

#: values that an option may have: JSON scalars, so that a manifest can hold them
Option = bool | int | float | str | None
Owner = TypeVar("Owner")
_KINDS: dict[type, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    tuple: "a list of numbers",
    Path: "a path",
}


@dataclass(frozen=True)
class OptionField:
    """One declared option.

    Attributes:
        name: the field's name.
        type: its annotated type, as msgspec converts to it.
        kind: bool, int, float, str, Path, or tuple for a list of numbers.
        choices: the words that it accepts, besides values of `kind` if that is not str; empty if any text will do.
        default: its default.
        meta: its range, description and extras (see the module's docstring).
    """

    name: str
    type: Any
    kind: type
    choices: tuple[str, ...]
    default: Option
    meta: Meta

    @property
    def flag(self) -> str:
        """The option's flag on the command line, such as `--recycle-pool`."""
        return flag_of(self.name)

    @property
    def help(self) -> str:
        """What the option does, in a sentence."""
        return self.meta.description or ""

    @property
    def extra(self) -> Mapping[str, Any]:
        """The extras of `meta`; see the module's docstring."""
        return self.meta.extra or {}

    def parse(self, value: object, owner: str) -> Any:
        """Convert `value` to the option's type.

        Raises:
            InputError: it is of another type, out of range, or none of the choices.
        """
        if value is None and self.default is None:
            return None
        read = _read(value, self.kind)
        if value != self.default and not self._means_something(read):
            raise InputError(self._unreadable(value))
        try:
            return msgspec.convert(read, self.type, strict=False, dec_hook=lambda kind, text: kind(text))
        except msgspec.ValidationError as error:
            raise InputError(self._refusal(value, read, owner)) from error

    def _means_something(self, read: object) -> bool:
        """Whether a value is neither blank, nor no number (NaN, infinity), nor true or false for a number."""
        if isinstance(read, str):
            return bool(read.strip()) and "\0" not in read
        if isinstance(read, bool):
            return self.kind is bool
        numbers = read if isinstance(read, list | tuple) else [read]
        return all(math.isfinite(number) for number in numbers if isinstance(number, float))

    def _unreadable(self, value: object) -> str:
        choices = ", ".join(choice for choice in self.choices if choice)
        kind = _KINDS[self.kind]
        wanted = choices if choices and self.kind is str else f"{kind} or {choices}" if choices else kind
        return f"{self.flag} {str(value)!r} cannot be read; give {wanted}"

    def _refusal(self, value: object, read: object, owner: str) -> str:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        choices = ", ".join(choice for choice in self.choices if choice)
        if self.kind is str and choices:
            to = "" if owner.startswith("vtexport ") else f" to {owner}"
            return f"{self.flag} {shown} is unknown{to}; choose one of {choices}"
        kind = _KINDS[self.kind]
        try:
            msgspec.convert(read, tuple[float, ...] if self.kind is tuple else self.kind, strict=False)
        except msgspec.ValidationError:
            return self._unreadable(value)
        return f"{self.flag} {shown} is out of range; give {_range(self.meta, kind)}"


def flag_of(name: str) -> str:
    """The command-line flag of the option `name`."""
    return f"--{name.replace('_', '-')}"


def option_fields(owner: type) -> Mapping[str, OptionField]:
    """The options that the dataclass `owner` declares or inherits, by name, in the order of their declaration."""
    hints = get_type_hints(owner, include_extras=True)
    declared = {}
    for field in fields(owner):
        hint = hints[field.name]
        meta = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Meta)), None)
        if meta is not None:
            assert field.default is not MISSING, f"option {field.name} of {owner.__name__} has no default"
            kind, choices = _kind(hint)
            declared[field.name] = OptionField(field.name, _required(hint, meta), kind, choices, field.default, meta)
    return declared


def parse_options(owner: type[Owner], given: Mapping[str, object], name: str, **others: Any) -> Owner:
    """An `owner` with the options `given`, the other options at their defaults.

    Args:
        owner: a dataclass whose options are declared as above.
        given: values by option name, each in its own type or as text.
        name: what to call the owner in messages, such as `method fastv`.
        **others: fields that are not options.

    Raises:
        InputError: an option that the owner does not have, or an invalid value.
    """
    known = option_fields(owner)
    for option in given:
        if option not in known:
            raise InputError(f"{flag_of(option)} has no effect with {name}; leave it out")
    return owner(**{option: known[option].parse(value, name) for option, value in given.items()}, **others)


def validate(instance: object, name: str) -> None:
    """Convert the options of `instance`, a dataclass, to their declared types; a value may be given as text.

    Raises:
        InputError: a value is invalid; the message calls the owner `name`.
    """
    for option in option_fields(type(instance)).values():
        value = getattr(instance, option.name)
        if value != option.default:
            # A frozen dataclass refuses plain assignment even in `__post_init__`.
            object.__setattr__(instance, option.name, option.parse(value, name))


def option_values(instance: object) -> dict[str, Option]:
    """The options of `instance` by name, for a manifest."""
    return {name: getattr(instance, name) for name in option_fields(type(instance))}


def _read(value: object, kind: type) -> object:
    """Parse text as a number or a list of numbers by Python's rules (.5 is not a number in JSON), and join a list with
    commas where text is wanted; return any other value unchanged.
    """
    if kind is str and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if not isinstance(value, str):
        return value
    try:
        if kind is tuple:
            return [float(part) for part in value.split(",")]
        return kind(value) if kind in (int, float) else value
    except ValueError:
        return value


def _required(hint: Any, meta: Meta) -> Any:
    """The annotated type without None, which stands for an option that was not given."""
    inner = get_args(hint)[0]
    if get_origin(inner) in (Union, UnionType):
        inner = Union[tuple(part for part in get_args(inner) if part is not NoneType)]  # noqa: UP007 - made at run time
    return Annotated[inner, meta]


def _kind(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The plain type and the choices of an annotated type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return str, parts
    if origin in (Union, UnionType):
        kinds = [_kind(part) for part in parts if part is not NoneType]
        choices = tuple(choice for _, words in kinds for choice in words)
        return next((kind for kind, _ in kinds if kind is not str), str), choices
    return origin or hint, ()


def _range(meta: Meta, kind: str) -> str:
    """The range of a number, in words."""
    low = f"above {meta.gt:g}" if meta.gt is not None else "" if meta.ge is None else f"at least {meta.ge:g}"
    high = f"below {meta.lt:g}" if meta.lt is not None else "" if meta.le is None else f"at most {meta.le:g}"
    return f"{kind} {' and '.join(bound for bound in (low, high) if bound)}"
