"""What the command line prints on: reports on stdout, progress and warnings on stderr and never on stdout."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from vtexport.errors import printable

#: columns of what is no terminal: a pipe, a file, the log of a build server
_UNBOUNDED = 1_000_000


class _Output(Console):
    """A console that prints text as it is, in lines as long as they are unless a terminal shows them.

    Rich takes 80 columns where it knows no better, cuts tables to them, and reads [names] and :names: as its markup.
    """

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=not stderr)

    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        if not self.file.isatty():
            return ConsoleDimensions(_UNBOUNDED, 25)
        if self.is_dumb_terminal and self._width is None:
            # It knows no colours, but has a width.
            with contextlib.suppress(OSError, ValueError):
                columns, lines = os.get_terminal_size(self.file.fileno())
                return ConsoleDimensions(columns or 80, lines or 25)
        return super().size

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)


stdout = _Output(stderr=False)
stderr = _Output(stderr=True)

#: seconds between two looks at a stage without a terminal; what is shorter than one gets no line until it is done
EVERY = 10.0
# A line says that at least this share is done since the last one, or that as many seconds have passed.
_SHARE, _SECONDS = 0.1, 60.0


class StageProgress:
    """One line per stage: a bar while it runs, its time when it is done."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._text = ""
        self._began = 0.0
        self.lines: Lines | None = None

    def stage(self, text: str, total: int | None = None) -> None:
        self.close()
        self._text, self._began = text, time.perf_counter()
        self._task = self._bar.add_task(text, total=total)
        if self.lines is not None:
            self.lines.begin(text, total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._bar.advance(self._task, steps)
        if self.lines is not None:
            self.lines.advance(steps)

    def warn(self, text: str) -> None:
        stderr.print(f"warning: {printable(text)}", style="yellow", markup=False)

    def close(self) -> None:
        """End the current stage and print its line."""
        if self.lines is not None:
            self.lines.end()
        if self._task is not None:
            self._bar.remove_task(self._task)
            seconds = time.perf_counter() - self._began
            stderr.print(f"  {self._text}  {seconds:.1f} s", style="dim", markup=False)
            self._task = None


@dataclass
class _Stage:
    """A stage that runs, and how far it was when its last line was printed."""

    text: str
    total: int | None
    began: float
    done: int = 0
    said: int = 0
    said_at: float = 0.0


class Lines:
    """How far a long stage is, in a line now and then: for logs, where a bar cannot move.

    A thread looks every `EVERY` seconds, so that steps of several minutes are seen to be running too. It prints if a
    tenth more is done, or a minute has passed, since its last line.
    """

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._show, self._clock = show, clock
        self._stage: _Stage | None = None
        self._lock = threading.Lock()

    def begin(self, text: str, total: int | None) -> None:
        with self._lock:
            now = self._clock()
            self._stage = _Stage(text, total, now, said_at=now)

    def advance(self, steps: int) -> None:
        with self._lock:
            if self._stage is not None:
                self._stage.done += steps

    def end(self) -> None:
        with self._lock:
            self._stage = None

    def look(self) -> None:
        """Print a line if the stage that runs is due for one."""
        with self._lock:
            stage, now = self._stage, self._clock()
            if stage is None or now - stage.said_at < EVERY:
                return
            grown = stage.total is not None and stage.done - stage.said >= max(1, _SHARE * stage.total)
            first = stage.said_at == stage.began
            if not grown and not first and now - stage.said_at < _SECONDS:
                return
            stage.said, stage.said_at = stage.done, now
            far = "" if stage.total is None else f"{stage.done} of {stage.total}, "
            line = f"  {stage.text}: {far}{now - stage.began:.0f} s"
            # Under the lock, so that no line comes after the one that says that the stage is done.
            self._show(line)


@contextlib.contextmanager
def _looking(lines: Lines) -> Iterator[None]:
    """Look at `lines` every `EVERY` seconds while the context is open."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            lines.look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Show stages on stderr: with a moving bar on a terminal, elsewhere with lines."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=stderr, transient=True)
    progress = StageProgress(bar)
    with contextlib.ExitStack() as stack:
        if stderr.is_terminal:
            bar.start()
            stack.callback(bar.stop)
        else:
            progress.lines = Lines(lambda line: stderr.print(line, style="dim", markup=False))
            stack.enter_context(_looking(progress.lines))
        yield progress
        progress.close()
