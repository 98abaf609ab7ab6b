"""Standard output and standard error: what may be written to them, and what becomes of it if they fail."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

from vtexport.errors import StorageError, printable
from vtexport.figures import to_json


def say(text: object, *, nl: bool = True, err: bool = False) -> None:
    """Print text that may come from outside: newlines and tabs are kept, nothing else that a terminal acts upon is."""
    click.echo(printable(str(text), keep="\n\t"), nl=nl, err=err)


def say_json(value: Any) -> None:
    """Print one line of JSON, whose strings are exact and ASCII."""
    click.echo(to_json(value))


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Run a command whose standard output may be closed, full or gone, or may not take every character.

    Raises:
        StorageError: standard output cannot be written.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        # In a C locale, or with PYTHONIOENCODING=ascii, what has no encoding is escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        failed = _failure(sys.stdout)
        if failed is None:
            if _failure(sys.stderr) is None:
                raise
            # There is no one to be told.
            sys.exit(2)
        if isinstance(failed, BrokenPipeError):
            # Who reads has seen enough, as in `vtexport list | head -1`.
            sys.exit(1)
        raise StorageError(
            f"standard output: {failed.strerror or failed}; free some space or write somewhere else"
        ) from error


def _open_closed() -> None:
    """Open /dev/null in place of standard streams that are closed (`>&-`).

    The next file to be opened would get such a stream's number, and whatever a library prints would go into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _failure(stream: TextIO | None) -> OSError | None:
    """Why `stream` cannot be written; it is then discarded, as Python would try again at its end and fail."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        return error
    return None
