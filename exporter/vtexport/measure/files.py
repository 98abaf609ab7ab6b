"""Checks, before the work, that its result can be written; writes files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vtexport.errors import InputError, StorageError


def check_folder(path: Path, flag: str) -> None:
    """Refuse a file whose folder does not exist; `flag` is the flag that named it.

    Raises:
        StorageError: the folder does not exist.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise StorageError(f"{path}: {parent} is not a folder; give another {flag}")


def check_picture(path: Path, flag: str) -> None:
    """Refuse a file that cannot become a picture; `flag` is the flag that named it.

    Raises:
        InputError: its suffix names no image format.
        StorageError: its folder does not exist.
    """
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: unknown image format; give a name that ends in .png")
    check_folder(path, flag)


def check_file(path: Path, flag: str) -> None:
    """Refuse a file that `write_whole` cannot write; `flag` is the flag that named it.

    Raises:
        InputError: it is a folder.
        StorageError: its folder does not exist, or is not writable.
    """
    check_folder(path, flag)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file as {flag}")
    try:
        # Checking permissions is not enough: root has them on a read-only file system too.
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; give another {flag}") from error


def write_whole(path: Path, text: str, remedy: str = "free some space or give another file") -> None:
    """Write `text` beside `path` and rename it, so that no one sees half of it; `remedy` ends the line of an error.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; {remedy}") from error
    finally:
        beside.unlink(missing_ok=True)
