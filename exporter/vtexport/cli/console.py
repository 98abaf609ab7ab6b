"""What the command line shows while it works: progress and warnings on stderr, never on stdout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False)


class StageProgress:
    """A line a stage: a bar while it runs, its time when it is done."""

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
        """End the current stage and leave its line behind."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            seconds = time.perf_counter() - self._began
            stderr.print(f"  {self._text}  {seconds:.1f} s", style="dim", markup=False)
            self._task = None


@contextlib.contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Stages shown on stderr; on a terminal with a moving bar."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=stderr, transient=True)
    # Off a terminal nothing moves: the finished stages' lines are all there is to see.
    if stderr.is_terminal:
        bar.start()
    try:
        progress = StageProgress(bar)
        yield progress
        progress.close()
    finally:
        if stderr.is_terminal:
            bar.stop()
