"""The engine folder: written whole or not at all, opened only if its manifest holds."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vtexport.bundle.manifest import MANIFEST, FileEntry, Manifest, decode
from vtexport.errors import BundleError, InputError, StorageError
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import read_clip
from vtexport.models.families import read_spec
from vtexport.models.spec import Asked, ModelSpec

PROCESSOR_FOLDER = "processor"
# Large, for a thread that hashes beside another's Python waits for the interpreter once a chunk.
_CHUNK = 32 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened engine folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read and validate the manifest, and see that every file it lists is there with its size.

        Raises:
            BundleError: no manifest, another schema version, a damaged manifest, or a missing or resized file.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; give a bundle made by vtexport build")
        if not path.is_file():
            raise BundleError(f"{folder} has no {MANIFEST}; give a bundle made by vtexport build")
        manifest = decode(path.read_bytes(), str(path))
        for entry in manifest.files:
            file = _inside(folder, entry.path)
            if not file.is_file():
                raise BundleError(f"{file} is missing; build the bundle again")
            if file.stat().st_size != entry.bytes:
                raise BundleError(
                    f"{file} has {file.stat().st_size} bytes, the manifest says {entry.bytes}; build the bundle again"
                )
        return cls(folder, manifest)

    @property
    def processor_folder(self) -> Path:
        return self.folder / PROCESSOR_FOLDER

    def spec(self) -> ModelSpec:
        """The geometry of the model inside, of its CLIP too if it has one."""
        asked = Asked(**self.manifest.model.views.asked)  # type: ignore[arg-type]  # names and values of its own
        spec, clip = read_spec(self.processor_folder, asked), self.processor_folder / CLIP_FOLDER
        return replace(spec, clip=read_clip(clip, spec.vision)) if clip.is_dir() else spec

    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.bytes for entry in self.manifest.files)

    def verify(self, advance: Callable[[int], None]) -> None:
        """Hash every file against the manifest; `advance` is called with bytes read.

        Raises:
            BundleError: a file was changed.
        """
        for entry in self.manifest.files:
            file = self.folder / entry.path
            if _sha256(file, advance) != entry.sha256:
                raise BundleError(f"{file} was changed since the build; build the bundle again")


def _inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refusing a path that leads out of the bundle."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{folder / MANIFEST} lists {relative!r}, a path outside the bundle; build it again")
    return folder / path


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            advance(length)
    return digest.hexdigest()


class Hashes:
    """The files of a folder that is still being filled, hashed in the background: of a large model, minutes.

    Start it when the large files are there; they must not change any more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vtexport-hash")
        self._stopped = False
        self._begun = {path: self._pool.submit(_sha256, path, self._advance) for path in self._files()}

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
            sha256 = _sha256(path, lambda _bytes: None) if begun is None else begun.result()
            entries.append(FileEntry(path.relative_to(self._folder).as_posix(), path.stat().st_size, sha256))
        return entries

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what is still being hashed."""
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)


def check_destination(out: Path, force: bool) -> None:
    """Refuse before any work what `write_folder` would refuse after it.

    Raises:
        InputError: `out` exists without `force`, or is something else than a bundle or an empty folder.
        StorageError: no folder can be made there.
    """
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out} is a file; give another --out")
        occupied = any(out.iterdir())
        # --force replaces a bundle, never a folder of the user's own.
        if occupied and not (out / MANIFEST).is_file():
            raise InputError(f"{out} is not empty and holds no bundle; give another --out")
        if occupied and not force:
            raise InputError(f"{out} already holds a bundle; give --force to replace it, or another --out")
    existing = _existing_parent(out)
    try:
        # Asking for permission is not enough: root is granted it on a read-only file system too.
        Path(tempfile.mkdtemp(prefix=".vtexport-", dir=existing)).rmdir()
    except OSError as error:
        raise StorageError(f"{out}: {existing} is not a writable folder; give another --out") from error


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
    """A temporary sibling of `out` that takes its place when the block ends well and vanishes when it does not.

    What stood at `out` before survives a failed block untouched.

    Raises:
        StorageError: the disk is full or read-only, or permission is lacking.
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
