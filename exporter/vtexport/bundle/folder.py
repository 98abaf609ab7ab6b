"""Opens an engine folder after checking it against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vtexport.bundle.agreement import disagreement
from vtexport.bundle.hashes import sha256
from vtexport.bundle.inside import check_inside, unlisted
from vtexport.bundle.manifest import MANIFEST, FileEntry, Manifest, decode
from vtexport.errors import BundleError, InputError, ModelError, first_line
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import read_clip
from vtexport.models.families import read_spec
from vtexport.models.spec import ModelSpec, ViewChoice
from vtexport.options import parse_options
from vtexport.reading import Unreadable, read_bytes
from vtexport.targets import Target, get_target

PROCESSOR_FOLDER = "processor"
#: files below this size are hashed whenever a bundle is opened, which takes milliseconds
HASHED_BYTES = 32 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened engine folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Read and validate the manifest, and check the files that it lists and the model that it describes.

        Files of less than `HASHED_BYTES`, which graphs, processors and libraries are, are hashed as well: a damaged one
        would fail in a runtime or a parser. Whatever its size, so is what runs as code. Weights are hashed by `verify` alone.

        Raises:
            BundleError: no manifest, another schema version, a damaged manifest; a file that is missing, changed or not
                listed, a link, or a manifest that says of the model what processor/config.json does not.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        _check_there(folder, path)
        try:
            manifest = decode(read_bytes(path), path)
            check_inside(folder, manifest.files)
            opened = cls(folder, manifest)
            opened._check_small_files()
            opened._check_model()
        except (Unreadable, OSError) as error:
            raise BundleError(f"{folder} cannot be read ({first_line(error)}); build the bundle again") from error
        return opened

    def _check_small_files(self) -> None:
        # A plan for later versions of TensorRT carries code for the host, which runs.
        host_code = getattr(self.target(), "version_compatible", False)
        code = (".so", ".plan", ".engine") if host_code else (".so",)
        for entry in self.manifest.files:
            if entry.bytes < HASHED_BYTES or entry.path.endswith(code):
                self._check_hash(entry, lambda _bytes: None)

    def _check_hash(self, entry: FileEntry, advance: Callable[[int], None]) -> None:
        file = self.folder / entry.path
        if sha256(file, advance) != entry.sha256:
            raise BundleError(f"{file} was changed since the build; build the bundle again")

    def _check_model(self) -> None:
        target = self.target()
        try:
            wrong = disagreement(self.manifest, self.spec(), target)
        except (ModelError, InputError) as error:
            wrong = str(error)
        if wrong is not None:
            raise BundleError(f"{self.folder / MANIFEST} is damaged ({wrong}); build the bundle again")

    @property
    def processor_folder(self) -> Path:
        return self.folder / PROCESSOR_FOLDER

    def spec(self) -> ModelSpec:
        """The geometry of the model inside, and of its CLIP if it has one."""
        choice = parse_options(ViewChoice, self.manifest.model.views.asked, "this bundle")
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
            self._check_hash(entry, advance)

    def unlisted(self) -> list[str]:
        """Files in the bundle's folder that its manifest does not list; what TensorRT-LLM's scripts make is there."""
        return unlisted(self.folder, self.manifest.files)


def _check_there(folder: Path, manifest: Path) -> None:
    """Refuse a folder that is none, or that has no manifest."""
    try:
        is_folder, has_manifest = folder.is_dir(), manifest.is_file() or manifest.is_symlink()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        is_folder = has_manifest = False
    if not is_folder:
        raise BundleError(f"{folder} is not a folder; give a bundle made by vtexport build")
    if not has_manifest:
        raise BundleError(f"{folder} has no {MANIFEST}; give a bundle made by vtexport build")
