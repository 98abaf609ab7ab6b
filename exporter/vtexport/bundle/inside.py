"""What lies in a bundle's folder: regular files that its manifest lists, no links, nothing that a loader picks up besides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vtexport.bundle.manifest import MANIFEST, FileEntry
from vtexport.errors import BundleError

#: folders from which a runtime or transformers takes what it finds by name; others may hold what was made later, such as
#: the language model that TensorRT-LLM's script builds
CLOSED = ("engine", "processor", "plugins")


def check_inside(folder: Path, files: Sequence[FileEntry]) -> None:
    """Refuse a bundle whose files are not those that `files` lists.

    Raises:
        BundleError: a path outside the bundle, a file that is missing or has another size, a link or a device, or a
            file in one of the folders `CLOSED` that is not listed.
    """
    for entry in files:
        path = PurePosixPath(entry.path)
        if (
            path.is_absolute()
            or ".." in path.parts
            or str(path) != entry.path
            or "\\" in entry.path
            or "\0" in entry.path
        ):
            raise BundleError(f"{folder / MANIFEST} lists {entry.path!r}, a path outside the bundle; build it again")
    sizes, strange = _found(folder)
    for name in strange:
        raise BundleError(
            f"{folder / name} is a link or no regular file; copy the bundle with cp -rL, or build it again"
        )
    for entry in files:
        if entry.path not in sizes:
            raise BundleError(f"{folder / entry.path} is missing; build the bundle again")
        if sizes[entry.path] != entry.bytes:
            raise BundleError(
                f"{folder / entry.path} has {sizes[entry.path]} bytes, the manifest says {entry.bytes}; build the "
                "bundle again"
            )
    for name in _besides(sizes, files):
        if PurePosixPath(name).parts[0] in CLOSED:
            raise BundleError(f"{folder / name} is not one of the files of this bundle; remove it")


def unlisted(folder: Path, files: Sequence[FileEntry]) -> list[str]:
    """The files below `folder` that are neither in `files` nor the manifest, sorted."""
    return _besides(_found(folder)[0], files)


def _besides(found: Iterable[str], files: Sequence[FileEntry]) -> list[str]:
    return sorted(set(found) - {entry.path for entry in files} - {MANIFEST})


def _found(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The sizes of all regular files below `folder`, by path, and what is none: links, to folders too, and devices."""
    sizes: dict[str, int] = {}
    strange: list[str] = []
    todo = [(folder, "")]
    while todo:
        place, prefix = todo.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append((Path(entry.path), f"{prefix}{entry.name}/"))
                elif entry.is_file(follow_symlinks=False):
                    sizes[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size
                else:
                    strange.append(prefix + entry.name)
    return sizes, sorted(strange)
