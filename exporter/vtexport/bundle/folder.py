"""Opens an engine folder after checking it against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vtexport.bundle.hashes import sha256
from vtexport.bundle.manifest import MANIFEST, Manifest, decode
from vtexport.errors import BundleError, InputError
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import read_clip
from vtexport.models.families import read_spec
from vtexport.models.spec import ModelSpec, ViewChoice
from vtexport.targets import Target, get_target

PROCESSOR_FOLDER = "processor"


@dataclass(frozen=True)
class Bundle:
    """An opened engine folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Read and validate the manifest, and check that every file it lists is there and has the listed size.

        Raises:
            BundleError: no manifest, another schema version, a damaged manifest, or a missing or resized file.
        """
        folder = Path(folder)
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
        """The geometry of the model inside, and of its CLIP if it has one."""
        choice = ViewChoice(**self.manifest.model.views.asked)  # type: ignore[arg-type]  # names and values of its own
        spec, clip = read_spec(self.processor_folder, choice), self.processor_folder / CLIP_FOLDER
        return replace(spec, clip=read_clip(clip, spec.vision)) if clip.is_dir() else spec

    def target(self) -> Target:
        """The target that it was built for, with the options of the build.

        Raises:
            BundleError: the manifest names an unknown target or option.
        """
        entry = self.manifest.target
        try:
            return get_target(entry.name, entry.options)
        except InputError as error:
            raise BundleError(f"{self.folder / MANIFEST} is damaged ({error}); build the bundle again") from error

    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.bytes for entry in self.manifest.files)

    def verify(self, advance: Callable[[int], None]) -> None:
        """Hash every file against the manifest; `advance` is called with the number of bytes read.

        Raises:
            BundleError: a file was changed.
        """
        for entry in self.manifest.files:
            file = self.folder / entry.path
            if sha256(file, advance) != entry.sha256:
                raise BundleError(f"{file} was changed since the build; build the bundle again")


def _inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refusing a path that leads out of the bundle."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{folder / MANIFEST} lists {relative!r}, a path outside the bundle; build it again")
    return folder / path
