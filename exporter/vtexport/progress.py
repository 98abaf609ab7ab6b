"""Where long work reports what it does."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a build reports; `vtexport.cli.console` shows it, `Silent` does not."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage of `total` steps (None: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage that were done."""

    def warn(self, text: str) -> None:
        """A warning for the user."""


class Silent:
    """A `Progress` that shows nothing."""

    def stage(self, text: str, total: int | None = None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def warn(self, text: str) -> None: ...
