"""Checks of where a result is to be written, before the work that makes it."""

from __future__ import annotations

from pathlib import Path

from vtexport.errors import InputError, StorageError


def check_folder(path: Path, flag: str) -> None:
    """Refuse a file whose folder is not there; `flag` is what named it.

    Raises:
        StorageError: it is not.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise StorageError(f"{path}: {parent} is not a folder; give another {flag}")


def check_picture(path: Path, flag: str) -> None:
    """Refuse a file that cannot become a picture; `flag` is what named it.

    Raises:
        InputError: its suffix names no image format.
        StorageError: its folder is not there.
    """
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: unknown image format; give a name that ends in .png")
    check_folder(path, flag)
