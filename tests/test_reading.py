"""Files that anyone may have written are read within bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vtexport.reading import Unreadable, parse_json, read_bytes, read_json, read_text, read_toml


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b'"\\ud800"', "truncated"),
        (b"{", "truncated"),
        (b"NaN", "malformed"),
        (b"", "truncated"),
    ],
)
def test_what_is_no_json_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_json(data)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(Unreadable, match=reason):
        read_json(tmp_path / "a.json")


def test_json_has_the_type_that_was_asked_for() -> None:
    assert parse_json(b"\xef\xbb\xbf[1, 2]", list[int]) == [1, 2]
    with pytest.raises(Unreadable, match=r"Expected `int`, got `str` - at `\$\[0\]`"):
        parse_json('["1"]', list[int])


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a = " + "[" * 100_000, "nested too deeply"), ("a =", "Invalid value"), ("a = 1", "Expected `str`")],
)
def test_what_is_no_toml_is_named(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Unreadable, match=reason):
        read_toml(path, kind=dict[str, str])
    path.write_text('a = "b"', encoding="utf-8")
    assert read_toml(path, kind=dict[str, str]) == {"a": "b"}


def test_sizes_are_bounded_and_pipes_are_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]", encoding="utf-8")
    assert read_text(path, 9) == "[1, 2, 3]"
    with pytest.raises(Unreadable, match="larger than 8 bytes"):
        read_bytes(path, 8)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "No such file")):
        with pytest.raises(Unreadable, match=reason):
            read_bytes(tmp_path / name)
    with pytest.raises(Unreadable, match="larger than 100 bytes"):
        read_bytes(Path("/dev/zero"), 100, regular=False)
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(Unreadable):
            read_bytes(Path(name))


def test_types_stay_checked(tmp_path: Path) -> None:
    value: Any = read_json(_written(tmp_path, '{"a": [1, 2.5, null, true, "b"]}'))
    assert value == {"a": [1, 2.5, None, True, "b"]}


def _written(folder: Path, text: str) -> Path:
    path = folder / "b.json"
    path.write_text(text, encoding="utf-8")
    return path
