"""Checks, before the work, that its result can be written."""

from __future__ import annotations

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
