"""Standard output and standard error: what may be written to them, and what becomes of it if they fail."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

from vtexport.errors import StorageError, printable
from vtexport.figures import to_json

_VERBOSITY = "TRANSFORMERS_VERBOSITY"


def say(text: object, *, nl: bool = True, err: bool = False) -> None:
    """Print text that may come from outside: newlines and tabs are kept, nothing else that a terminal acts upon is."""
    click.echo(printable(str(text), keep="\n\t"), nl=nl, err=err)


def say_json(value: Any) -> None:
    """Print one line of JSON, whose strings are exact and ASCII."""
    click.echo(to_json(value))


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Run a command whose standard streams may be closed, full or gone, or may not take every character.

    Raises:
        StorageError: standard output cannot be written.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, needed=True), _lasting(sys.stderr, needed=False)
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        # Who reads has seen enough, as in `vtexport list | head -1`; Click and Rich take it so too.
        sys.exit(1)
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Hold transformers to errors and Pillow to silence, and escape what others log or warn of, which may quote a file.

    Of a config.json, transformers warns of much that vtexport refuses in a line of its own, or has no use for; Pillow logs
    why it refuses an image. `TRANSFORMERS_VERBOSITY` is transformers' own setting, and stays as it is where it is set.
    """
    set_here = _VERBOSITY not in os.environ
    os.environ.setdefault(_VERBOSITY, "error")
    before, pillow = logging.getLogRecordFactory(), logging.getLogger("PIL")
    level = pillow.level
    pillow.setLevel(logging.CRITICAL)
    logging.setLogRecordFactory(_Record)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(before)
        pillow.setLevel(level)
        if set_here:
            os.environ.pop(_VERBOSITY, None)


class _Record(logging.LogRecord):
    """A message of a library."""

    def getMessage(self) -> str:
        return printable(super().getMessage(), keep="\n\t")


class _Descriptor(io.FileIO):
    """A standard stream's file, of which nobody tries to write the rest once it has failed."""

    def __init__(self, number: int, *, needed: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._needed = needed
        self._failed = False

    def write(self, data: Any, /) -> int:
        if self._failed:
            return len(data)
        try:
            return super().write(data) or 0
        except OSError as error:
            self._failed = True
            if not self._needed:
                # Progress that nobody reads is no reason to stop.
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise StorageError(
                f"standard output: {error.strerror or error}; free some space or write somewhere else"
            ) from error


def _lasting(stream: TextIO, *, needed: bool) -> TextIO:
    """`stream` with failures told once, and with escapes for what its encoding lacks; other than files stay as they are."""
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() not in (1, 2):
        return stream
    stream.flush()
    file = io.BufferedWriter(_Descriptor(stream.fileno(), needed=needed))
    # In a C locale, or with PYTHONIOENCODING=ascii, no name and no answer may end a command.
    return io.TextIOWrapper(
        file, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering or not needed
    )


def _open_closed() -> None:
    """Open /dev/null in place of standard streams that are closed (`>&-`).

    The next file to be opened would get such a stream's number, and whatever a library prints would go into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
