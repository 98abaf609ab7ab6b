"""SHA-256 of a bundle's files, in the background while it is still being made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vtexport.bundle.manifest import FileEntry

# Large, because a thread that hashes while another runs Python waits for the interpreter lock once per chunk.
_CHUNK = 32 << 20


def sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            advance(length)
    return digest.hexdigest()


class Hashes:
    """Hashes the files of a folder in the background while it is still being filled; large models take minutes.

    Start it when the large files are there; they must not change any more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vtexport-hash")
        self._stopped = False
        self._begun = {path: self._pool.submit(sha256, path, self._advance) for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file())

    def _advance(self, _bytes: int) -> None:
        if self._stopped:
            raise InterruptedError

    def entries(self) -> list[FileEntry]:
        """Entries of all files that are there now, sorted by path."""
        entries = []
        for path in self._files():
            begun = self._begun.get(path)
            digest = sha256(path, lambda _bytes: None) if begun is None else begun.result()
            entries.append(FileEntry(path.relative_to(self._folder).as_posix(), path.stat().st_size, digest))
        return entries

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what is still being hashed."""
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)
