"""A folder beside a destination that one process at a time has: what it makes lies there until it gets its name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vtexport.errors import InputError
from vtexport.stopping import undisturbed
from vtexport.writing import lock, status

_BUILDING = ".vtexport-building"
_TRIES = 100


@contextlib.contextmanager
def claimed(out: Path, place: Path, name: str) -> Iterator[Path]:
    """The folder in which `place` is made: empty, and this process's alone until the block ends.

    It is locked, not marked: if its process is killed, the lock ends too, and the next one takes the folder over.

    Args:
        out: the destination as the user gave it, for messages.
        place: the destination.
        name: what the user calls it.

    Raises:
        InputError: another process has the folder.
        OSError: it cannot be made.
    """
    folder, number, mine = place.with_name(f".{place.name}{_BUILDING}"), None, False
    try:
        # A signal between making the folder and knowing of it would leave it behind.
        with undisturbed():
            try:
                number = _claim(folder)
            except BlockingIOError as error:
                raise InputError(f"another process is writing {out}; wait for it, or give another {name}") from error
            if number is None:
                # Without locks nobody knows whose a folder is: each process has one of its own, which none but itself
                # removes.
                folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
            mine = True
        if number is not None:
            _empty(folder)
        yield folder
    finally:
        if mine:
            with undisturbed():
                _release(folder, number)


def _claim(folder: Path) -> int | None:
    """Make `folder`, or take over a dead process's, and lock it.

    Returns:
        the descriptor that holds the lock; None if this file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    for _ in range(_TRIES):
        made = False
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
            made = True
        try:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        held = lock(number)
        if held and _is_open_at(number, folder):
            if os.fstat(number).st_uid == os.geteuid():
                return number
            os.close(number)
            raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
        os.close(number)
        if held is None:
            if made:
                folder.rmdir()
            return None
        if not held:
            break
        # Its owner has moved it away or removed it between `open` and `lock`.
    raise BlockingIOError


def _is_open_at(number: int, folder: Path) -> bool:
    found = status(folder)
    return found is not None and os.path.samestat(found, os.fstat(number))


def _release(folder: Path, number: int | None) -> None:
    """Remove `folder`, which holds what failed or what was replaced, and unlock it."""
    if number is not None and not _is_open_at(number, folder):
        # The folder has got its name. What is here now was replaced by it, or belongs to the next process.
        os.close(number)
        try:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return
        if not (lock(number) and _is_open_at(number, folder)):
            os.close(number)
            return
    remove(folder)
    if number is not None:
        os.close(number)


def _empty(folder: Path) -> None:
    folder.chmod(0o700)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink()


def remove(folder: Path) -> None:
    """Remove `folder` and what is in it; what cannot be removed stays."""
    shutil.rmtree(folder, onerror=_insist)


def _insist(call: Callable[..., Any], path: str, _error: object) -> None:
    """Try again in a folder that its user has made read-only."""
    with contextlib.suppress(OSError):
        os.chmod(os.path.dirname(path), 0o700)
        if os.path.isdir(path) and not os.path.islink(path):
            os.chmod(path, 0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            call(path)
