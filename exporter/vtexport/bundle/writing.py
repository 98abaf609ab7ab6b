"""Writes a bundle's folder whole or not at all, and puts it in place without taking anything else away.

What a build makes lies in `.NAME.vtexport-building` beside its destination NAME (`vtexport.bundle.claims`): a second
build to the same destination is refused, and what a killed one left is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vtexport.bundle.claims import claimed, remove
from vtexport.bundle.manifest import MANIFEST
from vtexport.errors import InputError, StorageError
from vtexport.figures import size
from vtexport.stopping import undisturbed
from vtexport.writing import FULL, journal, status, storage_error, umask

_OLD = ".vtexport-old"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
#: what rename says if something is in the place where a folder is to go
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
#: what tells one manifest from another without reading it
_Identity = tuple[int, int, int, int]


def check_destination(out: Path, force: bool, name: str = "--out") -> None:
    """Refuse before any work what `write_folder` would refuse after it; `name` is what the user calls `out`.

    Raises:
        InputError: `out` holds a bundle and `force` is not set, it is neither a bundle nor an empty folder, or another
            build writes there.
        StorageError: no folder can be made there.
    """
    place = _resolved(out)
    try:
        _check_occupant(out, place, force, name)
        if place.parent.is_dir():
            with claimed(out, place, name):
                _put_back(place)
                # A killed build's old bundle may be back in its place.
                _check_occupant(out, place, force, name)
        else:
            # Checking permissions is not enough: root has them on a read-only file system too.
            tempfile.TemporaryFile(dir=_existing_parent(out)).close()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise storage_error(out, error, f"give another {name}") from error
        raise StorageError(f"{out}: {_existing_parent(out)} is not a writable folder; give another {name}") from error
    journal.planned.add(out)


def _check_occupant(out: Path, place: Path, force: bool, name: str) -> _Identity | None:
    """Refuse a destination that must not be replaced; return the manifest that is there, or None if there is none."""
    if status(place) is None:
        return None
    if not place.is_dir():
        raise InputError(f"{out} is a file; give another {name}")
    for reason, is_so in (
        ("the current folder", place == Path(os.path.realpath(os.curdir))),
        ("where a file system is mounted", os.path.ismount(place)),
    ):
        if is_so:
            raise InputError(f"{out} is {reason}, which cannot be replaced; give a folder inside it as {name}")
    occupied = any(place.iterdir())
    # --force replaces a bundle, never a folder of the user's own.
    if occupied and not (place / MANIFEST).is_file():
        raise InputError(f"{out} is not empty and holds no bundle; give another {name}")
    if occupied and not force:
        remedy = "give --force to replace it, or another --out" if name == "--out" else f"give another {name}"
        raise InputError(f"{out} already holds a bundle; {remedy}")
    return _identity(place)


def _identity(place: Path) -> _Identity | None:
    found = status(place / MANIFEST)
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _resolved(out: Path) -> Path:
    """The folder itself, where `out` is a symbolic link."""
    try:
        return Path(os.path.realpath(out))
    except ValueError as error:
        raise InputError(f"{str(out)!r} is no name of a folder; give another") from error


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    return next(path for path in [parent, *parent.parents] if os.path.exists(path))


def same_file_system(folder: Path, out: Path) -> bool:
    """Whether files of `folder` can be hard-linked to where `out` will be."""
    return folder.stat().st_dev == _existing_parent(out).stat().st_dev


def check_space(out: Path, needed: int) -> None:
    """Refuse a build that cannot fit.

    Raises:
        StorageError: fewer than `needed` bytes are free where `out` will be.
    """
    existing = _existing_parent(out)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{out}: the bundle needs about {size(needed)} but {existing} has {size(free)} free; "
            "free some space or give another --out"
        )


@contextlib.contextmanager
def write_folder(out: Path, force: bool = False, name: str = "--out") -> Iterator[Path]:
    """An empty folder that becomes `out` if the block succeeds and is removed if it fails.

    An existing `out` is left untouched if the block fails. If it succeeds, an empty folder is replaced, and with `force`
    the bundle that was there when the block began; nothing else is.

    Args:
        out: the destination.
        force: replace an existing bundle.
        name: what the user calls `out`.

    Raises:
        InputError: see `check_destination`, or something else came to `out` while the block ran.
        StorageError: the disk is full or read-only, or permission is missing.
    """
    place = _resolved(out)
    made: list[Path] = []
    try:
        _make_parents(place.parent, made)
        with claimed(out, place, name) as folder:
            _put_back(place)
            before = _check_occupant(out, place, force, name)
            yield folder
            # The folder was private; a bundle is as readable as any other output.
            folder.chmod(0o777 & ~umask())
            with undisturbed():
                _put(folder, place, before, f"{out} changed while this ran and was left as it is; give another {name}")
                journal.note(out)
                made.clear()
    except OSError as error:
        file = _elsewhere(error, place)
        remedy = f"give another {name}, nothing was written" if file is None else "nothing was written"
        raise storage_error(file or out, error, remedy) from error
    finally:
        with undisturbed(), contextlib.suppress(OSError):
            for parent in reversed(made):
                parent.rmdir()


def _elsewhere(error: OSError, place: Path) -> Path | None:
    """The file that an error names if it is none of those that become `place`: what is read may fail as well.

    Where there is no room, what was read is named too, by a copy, and is not at fault.
    """
    if error.errno in FULL or not isinstance(error.filename, (str, bytes)):
        return None
    file = Path(os.fsdecode(error.filename))
    ours = (str(place), str(place.with_name(f".{place.name}.vtexport-")))
    return None if os.path.realpath(file).startswith(ours) else file


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make `parent` and what is missing above it; `made` gets what was made, which a failed build removes again."""
    missing = [path for path in (parent, *parent.parents) if status(path) is None]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            made.append(path)


def _put_back(place: Path) -> None:
    """Give the old bundle of a process that was killed between two renames its name back; see `_put`."""
    old = place.with_name(f".{place.name}{_OLD}")
    if not old.is_dir() or old.is_symlink():
        return
    if not os.path.lexists(place):
        old.rename(place)
    elif _identity(old) is not None:
        remove(old)


def _put(folder: Path, place: Path, before: _Identity | None, changed: str) -> None:
    """Move `folder` to `place`, where the bundle `before` is, or nothing; what was there is in `folder` then.

    Raises:
        InputError: something else is there, with `changed` as its message.
    """
    if before is None or status(place) is None:
        try:
            # It fails where anything but an empty folder is.
            folder.rename(place)
        except OSError as error:
            if error.errno in _OCCUPIED:
                raise InputError(changed) from error
            raise
    elif _exchanged(folder, place):
        if _identity(folder) != before:
            _exchanged(folder, place)
            raise InputError(changed)
    else:
        if _identity(place) != before:
            raise InputError(changed)
        old = place.with_name(f".{place.name}{_OLD}")
        place.rename(old)
        try:
            folder.rename(place)
        except OSError:
            old.rename(place)
            raise
        old.rename(folder)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
