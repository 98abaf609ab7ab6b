"""Damage done to valid files: to their bytes, and to the values of JSON, TOML and safetensors headers."""

from __future__ import annotations

import json
import math
import random
import struct
import tomllib
from collections.abc import Callable
from typing import Any

_LARGEST = 1 << 20
_NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
    1 << 64,
    -(1 << 63),
]
_FLOATS = [0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf]
_WORDS = [
    "",
    "..",
    "../../outside",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m\r\n",
    "\ud800",
    "é" * 300,
    "a" * 70_000,
    "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "vision",
    "decoder.999999999999",
    "1" * 5000,
    "float32",
    "~nouser",
]
_BYTES = [
    b"\0",
    b"\xff",
    b"\x80",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"=",
    b"\n",
    b"\x1b[2J",
    b"-",
    b"e9",
    b"\\u0000",
]


class Pairs(list[list[Any]]):
    """An object's keys and values; a key may come twice, which no dict can say."""


class Raw(str):
    """Text that is written as it stands."""


def mutate(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of `seeds` with a few pieces of damage; the same for the same state of `rng`."""
    data = rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
        damaged = _structure(data, rng) if rng.random() < 0.6 else None
        data = _bytes(data, seeds, rng) if damaged is None else damaged
    return data[:_LARGEST]


# Bytes


def _place(data: bytes, rng: random.Random) -> int:
    # Headers stand in front, so damage there tells more.
    return rng.randint(0, min(len(data), 64) if rng.random() < 0.3 else len(data))


def _bytes(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    return rng.choice(_BYTE_MUTATIONS)(data, seeds, rng)


def _flip(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        changed[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(_BYTES) * rng.choice([1, 1, 1, 3, 3, 2000]) + data[place:]


def _delete(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + rng.choice([1, 1, 4, 50]) :]


def _truncate(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _duplicate(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    place, length = _place(data, rng), rng.choice([1, 8, 100])
    return data[: place + length] + data[place:]


def _splice(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(seeds)
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _interesting(data: bytes, _seeds: list[bytes], rng: random.Random) -> bytes:
    """A number in binary, or in digits where digits stand."""
    place, number = _place(data, rng), rng.choice(_NUMBERS)
    form = rng.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
    written = struct.pack(form, number % (1 << (8 * struct.calcsize(form))))
    if data[place : place + 1].isdigit():
        written = str(number).encode()
    return data[:place] + written + data[place + len(written) :]


_BYTE_MUTATIONS: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [
    _flip,
    _insert,
    _delete,
    _truncate,
    _duplicate,
    _splice,
    _interesting,
]


# Values


def _structure(data: bytes, rng: random.Random) -> bytes | None:
    """`data` with one value damaged; None if it has no such structure."""
    read = _read(data)
    if read is None:
        return None
    document, write = read
    holders = _holders(document)
    if not holders:
        return write(_other(document, rng))
    holder = rng.choice(holders)
    place = rng.randrange(len(holder)) if len(holder) else 0
    rng.choice(_STRUCTURE_MUTATIONS)(holder, place, holders, rng)
    try:
        return write(document)
    except (RecursionError, ValueError):
        return None


def _read(data: bytes) -> tuple[Any, Callable[[Any], bytes]] | None:
    try:
        if len(data) > 8 and (length := int.from_bytes(data[:8], "little")) <= len(data) - 8:
            header = json.loads(data[8 : 8 + length], object_pairs_hook=_pairs)
            rest = data[8 + length :]

            def write(value: Any) -> bytes:
                text = _json(value).encode("utf-8", "surrogatepass")
                return len(text).to_bytes(8, "little") + text + rest

            return header, write
    except (ValueError, RecursionError):
        pass
    try:
        if data.lstrip()[:1] in (b"{", b"["):
            return json.loads(data, object_pairs_hook=_pairs), lambda v: _json(v).encode("utf-8", "surrogatepass")
        if b"=" in data:
            found = json.loads(json.dumps(tomllib.loads(data.decode()), default=str), object_pairs_hook=_pairs)
            return found, lambda value: _toml(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        pass
    return None


def _pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs(map(list, pairs))


def _holders(document: Any) -> list[Any]:
    """All lists and objects in `document`, itself too."""
    found, todo = [], [document]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            found.append(one)
            todo += [value for _, value in one] if isinstance(one, Pairs) else one
    return found


def _get(holder: Any, place: int) -> Any:
    return holder[place][1] if isinstance(holder, Pairs) else holder[place]


def _set(holder: Any, place: int, value: Any) -> None:
    if isinstance(holder, Pairs):
        holder[place][1] = value
    else:
        holder[place] = value


def _other(value: Any, rng: random.Random) -> Any:
    """A value in place of `value`: of another type, or of the same and strange."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.6:
        near = [value + 1, value - 1, -value, value * 2, value * 1000] if abs(value) < 1e300 else [0]
        return rng.choice([*_NUMBERS, *_FLOATS, *near])
    if isinstance(value, str) and rng.random() < 0.6:
        place = rng.randint(0, len(value))
        return rng.choice(
            [*_WORDS, value + value, value[:place], value[:place] + rng.choice(_WORDS[2:8]) + value[place:]]
        )
    depth = rng.choice([3, 100, 1500, 30_000])
    kinds = [
        None,
        True,
        False,
        rng.choice(_NUMBERS),
        rng.choice(_FLOATS),
        rng.choice(_WORDS),
        [],
        Pairs(),
        [value, value],
        Pairs([["a", value]]),
        Raw("[" * depth + "]" * depth),
        Raw("1" * 5000),
        Raw("[" + "0, " * rng.choice([1, 100, 100, 20_000]) + "0]"),
    ]
    return rng.choice(kinds)


def _replace(holder: Any, place: int, _holders: list[Any], rng: random.Random) -> None:
    if holder:
        _set(holder, place, _other(_get(holder, place), rng))


def _drop(holder: Any, place: int, _holders: list[Any], _rng: random.Random) -> None:
    del holder[place : place + 1]


def _repeat(holder: Any, place: int, _holders: list[Any], rng: random.Random) -> None:
    if holder:
        one = holder[place]
        holder.insert(rng.randint(0, len(holder)), list(one) if isinstance(holder, Pairs) else one)


def _unknown(holder: Any, place: int, _holders: list[Any], rng: random.Random) -> None:
    value = _other(0, rng)
    holder.insert(place, [rng.choice(_WORDS), value] if isinstance(holder, Pairs) else value)


def _rename(holder: Any, place: int, holders: list[Any], rng: random.Random) -> None:
    if holder and isinstance(holder, Pairs):
        names = [name for one in holders if isinstance(one, Pairs) for name, _ in one]
        holder[place][0] = rng.choice([rng.choice(names), rng.choice(_WORDS)])


def _swap(holder: Any, place: int, holders: list[Any], rng: random.Random) -> None:
    """Put a copy of one value in another's place; references would make circles."""
    other = rng.choice(holders)
    if holder and other:
        copied = json.loads(_json(_get(other, rng.randrange(len(other)))), object_pairs_hook=_pairs)
        _set(holder, place, copied)


_STRUCTURE_MUTATIONS: list[Callable[[Any, int, list[Any], random.Random], None]] = [
    _replace,
    _replace,
    _replace,
    _drop,
    _repeat,
    _unknown,
    _rename,
    _swap,
]


def _json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {_json(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value)


def _toml(value: Any, top: bool = True) -> str:
    """TOML with every table inline but the first."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        lines = [f"{json.dumps(name)} = {_toml(one, False)}" for name, one in value]
        return "\n".join(lines) + "\n" if top else "{" + ", ".join(lines) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one, False) for one in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "null" if value is None else json.dumps(value)
