"""Writes files whole or not at all, and refuses before the work what could not be written after it.

A file is written beside its destination and renamed. A process that is killed meanwhile leaves `.vtexport-*` there, which
is locked as long as its writer lives; the next one that writes into this folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vtexport.errors import InputError, StorageError, first_line
from vtexport.stopping import undisturbed

_PREFIX = ".vtexport-"
#: what a write fails with where there is no room
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """What this process is to write, and what of it is in place; `vtexport` says so when it is stopped."""

    def __init__(self) -> None:
        self.planned: set[Path] = set()
        self.written: list[Path] = []

    def clear(self) -> None:
        self.planned.clear()
        self.written.clear()

    def note(self, path: Path) -> None:
        """`path` is in place; of no interest if nobody asked for it, as for files in temporary folders."""
        if path in self.planned:
            self.written.append(path)


journal = Journal()


class Output(NamedTuple):
    """A file to write: its path, what is to be in it, and the flag that named it."""

    path: Path
    data: str | bytes
    flag: str = "file"


def storage_error(path: Path, error: OSError, remedy: str) -> StorageError:
    """One line about a failed write to `path`; `remedy` is what helps, besides space if that is what is missing."""
    space = "free some space or " if error.errno in FULL else ""
    return StorageError(f"{path}: {error.strerror or first_line(error)}; {space}{remedy}")


def status(path: Path) -> os.stat_result | None:
    """What the system says of `path`, or None if nothing is there.

    Raises:
        OSError: it cannot be found out; the name may be too long.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise OSError(errno.EINVAL, first_line(error), str(path)) from error


def check_file(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, a file that `write_whole` cannot write.

    Args:
        path: the file.
        flag: the flag that named it.
        inputs: files that the work reads; none of them may be overwritten.

    Raises:
        InputError: it is a folder, or one of `inputs`.
        StorageError: its folder does not exist, or it cannot be written.
    """
    remedy = f"give another {flag}"
    try:
        there = status(path)
        parent = path.absolute().parent
        if not parent.is_dir():
            raise StorageError(f"{path}: {parent} is not a folder; {remedy}")
        if there is not None and stat.S_ISDIR(there.st_mode):
            raise InputError(f"{path} is a folder; {remedy}")
        for other in inputs:
            read = status(other)
            if there is not None and read is not None and os.path.samestat(there, read):
                raise InputError(f"{path} is an input, which {flag} would overwrite; {remedy}")
        _try(path, there)
    except OSError as error:
        raise storage_error(path, error, remedy) from error
    journal.planned.add(path)


def check_apart(outputs: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse flags that name the same file.

    Raises:
        InputError: two of them do.
    """
    taken: dict[str, str] = {}
    for flag, path in outputs:
        if path is None:
            continue
        first = taken.setdefault(os.path.realpath(path), flag)
        if first != flag:
            raise InputError(f"{first} and {flag} both name {path}; give another {flag}")


def _try(path: Path, there: os.stat_result | None) -> None:
    """Write nothing, as `path` will be written.

    Raises:
        OSError: that cannot be done.
    """
    if there is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if there is None or stat.S_ISREG(there.st_mode):
        # Checking permissions is not enough: root has them on a read-only file system too.
        with tempfile.TemporaryFile(dir=_target(path).parent) as file:
            file.write(b"\n")
    elif stat.S_ISCHR(there.st_mode):
        with path.open("wb", buffering=0) as device:
            device.write(b"")


def write_whole(path: Path, data: str | bytes, flag: str = "file") -> None:
    """Write `data` to `path`, whole or not at all; see `write_all`."""
    write_all([Output(path, data, flag)])


def write_all(outputs: Sequence[Output]) -> None:
    """Write several files, all of them or none.

    A file that exists keeps its permission bits; a symbolic link stays one. Into pipes and devices, the data is written
    as it is.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    with contextlib.ExitStack() as stack:
        ready = [(output, stack.enter_context(_staged(output))) for output in outputs]
        for output, staged in ready:
            if staged is None:
                with _reported(output):
                    _write_through(output)
                journal.note(output.path)
        with undisturbed():
            for output, staged in ready:
                if staged is not None:
                    with _reported(output):
                        os.replace(staged, _target(output.path))
                    journal.note(output.path)


@contextlib.contextmanager
def _reported(output: Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(output.path, error, f"give another {output.flag}") from error


@contextlib.contextmanager
def _staged(output: Output) -> Iterator[Path | None]:
    """The file beside the destination that has the data; None where there is no file to replace."""
    with contextlib.ExitStack() as stack:
        with _reported(output):
            there = status(output.path)
            if there is not None and (not stat.S_ISREG(there.st_mode) or _printed_to(there) is not None):
                staged = None
            else:
                staged = stack.enter_context(_beside(_target(output.path), _bytes(output), there))
        yield staged


@contextlib.contextmanager
def _beside(target: Path, data: bytes, there: os.stat_result | None) -> Iterator[Path]:
    """A file in the folder of `target` that holds `data`; it is removed at the end if it is still there."""
    sweep(target.parent)
    number, name = tempfile.mkstemp(prefix=_PREFIX, dir=target.parent)
    try:
        with os.fdopen(number, "wb") as file:
            lock(number)
            file.write(data)
            file.flush()
            os.fchmod(number, stat.S_IMODE(there.st_mode) if there is not None else 0o666 & ~umask())
            # Some file systems say only now that the disk is full.
            os.fsync(number)
            yield Path(name)
    finally:
        with undisturbed(), contextlib.suppress(OSError):
            os.unlink(name)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of files that they wrote into `folder`."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(number)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and lock(number):
                    path.unlink()
            finally:
                os.close(number)


def lock(number: int) -> bool | None:
    """Lock what the descriptor `number` is open on, until it is closed or the process ends.

    Returns:
        whether this process holds the lock; None where the file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def umask() -> int:
    """The permission bits that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _target(path: Path) -> Path:
    """The file itself, where `path` is a symbolic link."""
    return Path(os.path.realpath(path))


def _bytes(output: Output) -> bytes:
    return output.data.encode() if isinstance(output.data, str) else output.data


def _printed_to(there: os.stat_result) -> int | None:
    """The descriptor that has this file open as stdout or stderr, as when /dev/stdout is a file."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(there, os.fstat(number)):
                return number
    return None


def _write_through(output: Output) -> None:
    """Write into what is no file to be replaced: a pipe, a device, or where this process prints to."""
    printed = _printed_to(output.path.stat())
    if printed is not None:
        # Opened anew, a file would be cut off where others have written to it.
        (sys.stdout if printed == 1 else sys.stderr).flush()
    with open(output.path if printed is None else os.dup(printed), "wb") as file:
        file.write(_bytes(output))
