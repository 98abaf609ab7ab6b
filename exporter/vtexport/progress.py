"""The interface by which long-running work reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a build; `vtexport.cli.console` shows it, `Silent` does not."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps (None: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Count `steps` of the current stage as done."""

    def warn(self, text: str) -> None:
        """Show a warning to the user."""


class Silent:
    """A `Progress` that shows nothing."""

    def stage(self, text: str, total: int | None = None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def warn(self, text: str) -> None: ...
