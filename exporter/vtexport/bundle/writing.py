"""Writes an engine folder whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vtexport.bundle.manifest import MANIFEST
from vtexport.errors import InputError, StorageError


def check_destination(out: Path, force: bool, name: str = "--out") -> None:
    """Refuse before any work what `write_folder` would refuse after it; `name` is what the user calls `out`.

    Raises:
        InputError: `out` holds a bundle and `force` is not set, or it is neither a bundle nor an empty folder.
        StorageError: no folder can be made there.
    """
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out} is a file; give another {name}")
        occupied = any(out.iterdir())
        # --force replaces a bundle, never a folder of the user's own.
        if occupied and not (out / MANIFEST).is_file():
            raise InputError(f"{out} is not empty and holds no bundle; give another {name}")
        if occupied and not force:
            remedy = "give --force to replace it, or another --out" if name == "--out" else f"give another {name}"
            raise InputError(f"{out} already holds a bundle; {remedy}")
    existing = _existing_parent(out)
    try:
        # Checking permissions is not enough: root has them on a read-only file system too.
        Path(tempfile.mkdtemp(prefix=".vtexport-", dir=existing)).rmdir()
    except OSError as error:
        raise StorageError(f"{out}: {existing} is not a writable folder; give another {name}") from error


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    return next(path for path in [parent, *parent.parents] if path.exists())


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
            f"{out}: the bundle needs about {needed / 1e6:.0f} MB but {existing} has {free / 1e6:.0f} MB free; "
            "free some space or give another --out"
        )


@contextlib.contextmanager
def write_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that replaces it if the block succeeds and is removed if it fails.

    An existing `out` is left untouched if the block fails.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; give another --out") from error
    try:
        yield folder
        # mkdtemp makes private folders; a bundle is as readable as any other output.
        folder.chmod(0o777 & ~_umask())
        _swap(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(
                f"{out}: {error.strerror}; free some space or give another --out, nothing was written"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(folder: Path, out: Path) -> None:
    """Move `folder` to `out`; what was there is removed last, and put back if the move fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / "bundle")
    try:
        folder.rename(out)
    except OSError:
        (old / "bundle").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
