"""Progress and warnings of the command line, on stderr and never on stdout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False)


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
        stderr.print(f"warning: {text}", style="yellow", markup=False)

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
