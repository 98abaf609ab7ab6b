"""Weights once in memory: pages of mapped weight files are given back while OpenVINO packs them into its own format.

OpenVINO maps the files that a graph points into, and its CPU plugin copies what it packs for its kernels. A page that has
been copied is not read again, but counts as this process's memory until it is unmapped. Giving it back loses nothing: if
it is read after all, the system maps it again from the file.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_DONTNEED = 4
_PAUSE = 0.05


class Released:
    """A context in which pages of files in `folder` that this process has mapped are given back, again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder.resolve()}/"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="vtexport-release", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._release()

    def _repeat(self) -> None:
        while not self._done.wait(_PAUSE):
            self._release()

    def _release(self) -> None:
        advise = ctypes.CDLL(None).madvise
        for start, length in self._mapped():
            # Refused for pages that are locked, which then stay.
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)

    def _mapped(self) -> Iterator[tuple[int, int]]:
        """Address and length of every such mapping that is only read."""
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, rights, _, _, _, *path = line.split(maxsplit=5)
            if path and path[0].startswith(self._folder) and rights.startswith("r--"):
                start, end = (int(address, 16) for address in span.split("-"))
                yield start, end - start
