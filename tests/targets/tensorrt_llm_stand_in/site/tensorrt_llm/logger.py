"""A logger that keeps what it was told."""

from __future__ import annotations


class _Logger:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def _log(self, level: str, *message: object) -> None:
        self.lines.append((level, " ".join(map(str, message))))

    def debug(self, *message: object) -> None:
        """Keep it."""
        self._log("debug", *message)

    def info(self, *message: object) -> None:
        """Keep it."""
        self._log("info", *message)

    def warning(self, *message: object) -> None:
        """Keep it."""
        self._log("warning", *message)

    def error(self, *message: object) -> None:
        """Keep it."""
        self._log("error", *message)

    def info_once(self, *message: object, key: str) -> None:
        """Keep it."""
        self._log("info", *message)

    def warning_once(self, *message: object, key: str) -> None:
        """Keep it."""
        self._log("warning", *message)


logger = _Logger()
