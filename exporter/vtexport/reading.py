"""Reads files that anyone may have written: bounded bytes and depth, UTF-8 alone, nothing run, no pipe waited for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from vtexport.errors import first_line

#: bytes of a file of JSON or TOML; the largest that belongs to a model, an index of its shards, has some hundred kB
TEXT_BYTES = 8 << 20


class Unreadable(ValueError):
    """A file cannot be used; the message says why in a few words, and whoever reads it says what to do."""


def read_bytes(path: Path, most: int = TEXT_BYTES, *, regular: bool = True) -> bytes:
    """The bytes of `path`.

    Args:
        path: the file.
        most: how many bytes it may have.
        regular: whether only regular files are read; a pipe or a device that a model's folder holds may never end.

    Raises:
        Unreadable: it cannot be read, is no such file, or is larger.
    """
    try:
        if regular and path.exists() and not path.is_file():
            raise Unreadable("not a regular file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(getattr(error, "strerror", None) or first_line(error)) from error
    if len(data) > most:
        raise Unreadable(f"larger than {most} bytes")
    return data


def read_text(path: Path, most: int = TEXT_BYTES, *, regular: bool = True) -> str:
    """As `read_bytes`, decoded as UTF-8.

    Raises:
        Unreadable: as `read_bytes`, or it is not UTF-8.
    """
    return as_text(read_bytes(path, most, regular=regular))


def as_text(data: bytes) -> str:
    """`data` as UTF-8; a byte order mark in front, which editors on Windows write, is left out.

    Raises:
        Unreadable: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is not UTF-8") from error


def read_json(path: Path, most: int = TEXT_BYTES, kind: Any = Any) -> Any:
    """The JSON in `path`, of the type `kind`.

    Raises:
        Unreadable: as `read_text`, or it is not JSON, nested too deeply, or of another type.
    """
    return parse_json(read_bytes(path, most), kind)


def parse_json(data: bytes | str, kind: Any = Any) -> Any:
    """`data` as JSON of the type `kind`.

    Raises:
        Unreadable: it is not JSON, nested too deeply, or of another type.
    """
    text = as_text(data) if isinstance(data, bytes) else data
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Unreadable(first_line(error)) from error


def read_toml(path: Path, most: int = TEXT_BYTES, kind: Any = Any) -> Any:
    """The TOML in `path`, of the type `kind`.

    Raises:
        Unreadable: as `read_text`, or it is not TOML, nested too deeply, or of another type.
    """
    text = read_text(path, most)
    try:
        return msgspec.convert(tomllib.loads(text), kind)
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error
    except (ValueError, msgspec.ValidationError) as error:  # tomllib lets a number of 5000 digits fail as int() does
        raise Unreadable(first_line(error)) from error
