"""One module for each kind of file, with valid files to start from and one use of a damaged one."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """What a module here has."""

    @staticmethod
    def seeds(place: Path) -> list[bytes]:
        """Small valid files, always the same; `place` is an empty folder to work in."""
        ...

    @staticmethod
    def one(data: bytes, place: Path) -> None:
        """Use `data` as such a file and leave `place` as it was; a VtexportError is right, other exceptions are bugs."""
        ...


def names() -> list[str]:
    """The names of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Target:
    """The target `name`."""
    module: Target = importlib.import_module(f"{__name__}.{name}")  # type: ignore[assignment]
    return module
