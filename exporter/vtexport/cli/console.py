"""What the command line prints on: reports on stdout, progress and warnings on stderr and never on stdout."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
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

    @property
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


class StageProgress:
    """One line per stage: a bar while it runs, its time when it is done."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._text = ""
        self._began = 0.0

    def stage(self, text: str, total: int | None = None) -> None:
        self.close()
        self._text, self._began = text, time.perf_counter()
        self._task = self._bar.add_task(text, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._bar.advance(self._task, steps)

    def warn(self, text: str) -> None:
        stderr.print(f"warning: {printable(text)}", style="yellow", markup=False)

    def close(self) -> None:
        """End the current stage and print its line."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            seconds = time.perf_counter() - self._began
            stderr.print(f"  {self._text}  {seconds:.1f} s", style="dim", markup=False)
            self._task = None


@contextlib.contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Show stages on stderr, with a moving bar on a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=stderr, transient=True)
    # Without a terminal there is no bar, only the lines of finished stages.
    if stderr.is_terminal:
        bar.start()
    try:
        progress = StageProgress(bar)
        yield progress
        progress.close()
    finally:
        if stderr.is_terminal:
            bar.stop()
