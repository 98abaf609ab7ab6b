"""Runs targets on damaged files, under limits of time and memory, and says what broke."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.utils import logging

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, load
from vtexport.cli.streams import quieted
from vtexport.errors import VtexportError

SLOW_SECONDS = 2.0
#: growth of the resident set during one execution that is a finding
GROWTH_BYTES = 256 << 20
#: address space that a run may add to what it began with
SPACE_BYTES = 3 << 30
PACKAGE = "vtexport/"
_LIBC = ctypes.CDLL(None)


class TooSlow(BaseException):
    """An execution ran out of time; no `except Exception` may swallow it."""


class TooLarge(Exception):
    """An execution took too much memory."""


class Printed(Exception):
    """An execution wrote to a standard stream, where a command's own result and its one line of error belong."""


@dataclass
class Finding:
    """Executions that failed in the same way at the same line; `number` is the first of them."""

    kind: str
    line: str
    message: str
    number: int
    count: int = 1


@dataclass
class Summary:
    """What happened to a target."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    refused: int = 0
    accepted: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, found: Finding) -> None:
        """Count `found`, with those before it that are the same."""
        for known in self.findings:
            if (known.kind, known.line) == (found.kind, found.line):
                known.count, known.number = known.count + found.count, min(known.number, found.number)
                return
        self.findings.append(found)

    def merge(self, other: Summary) -> None:
        """Add another part of the same target's executions."""
        self.executions, self.seconds = self.executions + other.executions, self.seconds + other.seconds
        self.refused, self.accepted = self.refused + other.refused, self.accepted + other.accepted
        for found in other.findings:
            self.add(found)

    def report(self) -> dict[str, Any]:
        """As it is printed."""
        per_second = round(self.executions / self.seconds, 1) if self.seconds else None
        return {**asdict(self), "seconds": round(self.seconds, 1), "executions_per_second": per_second}


def input_of(seeds: list[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a run with `seed`: one of the valid files itself first, then damaged ones."""
    if number < len(seeds):
        return seeds[number]
    return mutate(seeds, random.Random(f"{seed} {number}"))


def attempt(target: Target, data: bytes, place: Path, seconds: float = SLOW_SECONDS) -> bool:
    """Whether `data` was accepted; False if it was refused in one printable line.

    Raises:
        BaseException: what is a bug in the target: any other exception, too much time or too much memory.
    """
    # Linux then counts the peak anew: a process that was once larger would hide what an input takes.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_bytes()
    accepted = True
    with _silent(), _time_limit(seconds):
        try:
            target.one(data, place)
        except VtexportError as error:
            accepted = False
            if len(str(error).splitlines()) != 1:
                raise ValueError(f"the refusal has several lines: {str(error)!r}") from error
    if (grown := _peak_bytes() - before) > GROWTH_BYTES:
        raise TooLarge(f"{grown >> 20} MiB for {len(data)} bytes")
    return accepted


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Catch what is printed, by Python and by compiled code, to either stream."""
    said = io.StringIO()
    with tempfile.TemporaryFile() as heard:
        sys.stdout.flush()
        kept = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in kept:
            os.dup2(heard.fileno(), number)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
        finally:
            _LIBC.fflush(None)
            for number, before in kept:
                os.dup2(before, number)
                os.close(before)
        heard.seek(0)
        if printed := said.getvalue().encode(errors="replace") + heard.read(1000):
            raise Printed(repr(printed[:1000]))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """Let this process grow by `SPACE_BYTES` only, so that a huge allocation fails and does not take the machine."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    space = pages * resource.getpagesize() + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))


@contextlib.contextmanager
def prepared(name: str) -> Iterator[tuple[Target, list[bytes], Path]]:
    """The target, its valid files, and an empty folder."""
    target = load(name)
    with _quiet(), tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        made, place = Path(folder, "seeds"), Path(folder, "place")
        made.mkdir()
        seeds = target.seeds(made)
        place.mkdir()
        yield target, seeds, place


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As on the command line, but transformers is imported already and has read its setting."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quieted():
            yield
    finally:
        logging.set_verbosity(before)


def run(name: str, numbers: range, seed: int, seconds: float, begin: Callable[[int], None] | None = None) -> Summary:
    """Execute inputs `numbers` of target `name`, for at most `seconds`; `begin` is told each number before it runs."""
    summary = Summary(name)
    with prepared(name) as (target, seeds, place):
        # Whatever is loaded on first use is no growth that an input causes.
        with contextlib.suppress(VtexportError):
            target.one(seeds[0], place)
        limit_memory()
        started = time.monotonic()
        for number in numbers:
            if time.monotonic() - started > seconds:
                break
            if begin is not None:
                begin(number)
            tally(summary, target, input_of(seeds, seed, number), place, number)
        summary.seconds = time.monotonic() - started
    return summary


def tally(summary: Summary, target: Target, data: bytes, place: Path, number: int) -> bool:
    """Attempt `data`, input `number` of a run, and add the outcome to `summary`; whether it is no finding."""
    summary.executions += 1
    try:
        accepted = attempt(target, data, place)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever else comes out of a target is what we look for
        summary.add(_finding(error, number))
        return False
    summary.accepted += accepted
    summary.refused += not accepted
    return True


def _finding(error: BaseException, number: int) -> Finding:
    """Where `error` came from: the innermost line of the package, or of anything else if it never got there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if PACKAGE in frame.filename] or frames
    line = f"{own[-1].filename.rpartition(PACKAGE)[2]}:{own[-1].lineno}" if own else "?"
    return Finding(type(error).__name__, line, str(error)[:200], number)
