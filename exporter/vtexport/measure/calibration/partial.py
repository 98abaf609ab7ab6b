"""Results of a calibration kept beside its output, so that the same command goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from vtexport.errors import InputError, StorageError
from vtexport.reading import Unreadable, read_bytes

# Some hundred bytes a pair and method; this is room for a hundred thousand pairs.
_BYTES = 256 << 20


def partial_file(out: Path) -> Path | None:
    """The file that keeps what was measured for `out` so far; None where that is a device or a pipe."""
    if out.exists() and not out.is_file():
        return None
    return out.with_name(f".{out.name}.partial")


def key_of(*facts: object) -> str:
    """A name for all that results depend on: `facts` (JSON), and the versions of what computes."""
    versions = [version(package) for package in ("vtexport", "torch", "transformers")]
    return hashlib.sha256(json.dumps([versions, facts], default=str).encode()).hexdigest()[:32]


def content_of(paths: Sequence[Path]) -> str:
    """A hash of the bytes of files; of a folder, of all files in it."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line: the results of a batch, by the key of what they depend on."""

    key: str
    results: msgspec.Raw


class Partial:
    """Results of batches by key, in a file of JSON lines that grows by one line per batch.

    A line that is damaged, such as the last one of a process that was killed, is left out; its batch runs again. A file
    without a line that this work can use is written anew.

    Args:
        path: the file; None keeps nothing.
        warn: told of a file without such a line.

    Raises:
        InputError: what stands there is no file, or too large to be one of these.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._warn, self._used = path, warn, False
        data = b""
        try:
            if path is not None and path.exists():
                data = read_bytes(path, _BYTES)
        except Unreadable as error:
            raise InputError(
                f"{path}: {error}, and results are kept there until all are measured; remove it"
            ) from error
        self._stale, self._torn = bool(data), not data.endswith(b"\n")
        self._found = dict(_read(data))

    def take(self, key: str, kind: Any, fits: Callable[[Any], bool]) -> Any:
        """The results kept under `key`, of the type `kind`; None if there are none, or none that `fits`."""
        try:
            results = msgspec.json.decode(self._found[key], type=kind)
        except (KeyError, msgspec.DecodeError, UnicodeError, RecursionError):
            return None
        if not fits(results):
            return None
        self._used = True
        return results

    def keep(self, key: str, results: Any) -> None:
        """Keep `results` under `key`.

        Raises:
            StorageError: the disk is full or read-only, or permission is missing.
        """
        if self._path is None:
            return
        line = msgspec.json.encode({"key": key, "results": results}) + b"\n"
        try:
            with self._path.open("ab" if self._used else "wb") as file:
                file.write(b"\n" + line if self._used and self._torn else line)
        except OSError as error:
            remedy = "free some space or give another -o"
            raise StorageError(f"{self._path}: {error.strerror or error}; {remedy}") from error
        if self._stale and not self._used:
            self._warn(f"{self._path} held nothing that this command can use, of other work or damaged; it began anew")
        self._used, self._torn = True, False


def _read(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The key and the results of every whole line."""
    for text in data.splitlines():
        try:
            line = msgspec.json.decode(text, type=_Line)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            continue
        yield line.key, bytes(line.results)
