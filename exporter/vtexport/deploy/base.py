"""The interface of roads: how a bundle becomes what another server or runtime loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from vtexport.bundle.folder import Bundle


class Road(ABC):
    """A layout that another program loads.

    To add one, write a subclass in a module of its own, and list it in `vtexport.deploy.roads.ROADS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle that this road cannot take, before anything is written.

        Raises:
            InputError: what the program cannot run, and what to build instead.
        """

    @abstractmethod
    def write(self, bundle: Bundle, folder: Path) -> str:
        """Write the layout into `folder`, which is empty.

        Returns:
            the command that starts it there, with OUT in the place of the folder.
        """
