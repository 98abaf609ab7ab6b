"""Where each tensor of a checkpoint lies, read from safetensors headers; no weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vtexport.errors import ModelError

#: safetensors dtype -> the dtype of the engine that its numbers go into
NEAREST = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "fp16"}
#: dtype of an engine -> the safetensors dtype whose bytes it takes as they are
AS_STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: which file, its safetensors dtype, its shape and its bytes [start, end) in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder of `.safetensors` files, by name."""

    folder: Path
    tensors: dict[str, TensorRecord]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of every shard and check each file against its own header.

        Raises:
            ModelError: no safetensors, a missing shard, or a file shorter than its header says.
        """
        return cls.of_files(folder, _shards(folder))

    @classmethod
    def of_files(cls, folder: Path, paths: Iterable[Path]) -> Checkpoint:
        """As `open`, for the files in `paths`."""
        tensors: dict[str, TensorRecord] = {}
        for path in paths:
            for record in _read_header(path):
                tensors[record.name] = record
        return cls(folder, tensors)

    @property
    def stored(self) -> str:
        """The safetensors dtype of most of the checkpoint's bytes."""
        sizes: dict[str, int] = {}
        for record in self.tensors.values():
            sizes[record.dtype] = sizes.get(record.dtype, 0) + record.end - record.start
        return max(sizes, key=lambda dtype: sizes[dtype], default="F32")

    def joined(self, prefix: str, other: Checkpoint) -> Checkpoint:
        """This checkpoint's tensors, and those of `other` with `prefix` before their names."""
        theirs = {prefix + name: record for name, record in other.tensors.items()}
        return Checkpoint(self.folder, {**self.tensors, **theirs})

    def find(self, prefixes: tuple[str, ...], suffix: str) -> TensorRecord:
        """The tensor whose name is one of `prefixes` followed by `suffix`.

        Raises:
            ModelError: the checkpoint has none of them.
        """
        for prefix in prefixes:
            if prefix + suffix in self.tensors:
                return self.tensors[prefix + suffix]
        raise ModelError(
            f"{self.folder} has no tensor {prefixes[0]}{suffix}; the checkpoint is incomplete, get it again"
        )


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint's weights, not its configuration alone."""
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error}); download it again") from error
        # The names come from a file, so a name that leads out of the folder is refused.
        strange = [name for name in names if Path(name).name != name]
        if strange:
            raise ModelError(f"{index} names {strange[0]!r}, a file outside the folder; get the checkpoint again")
        paths = [folder / name for name in names]
    elif single.is_file():
        paths = [single]
    else:
        binaries = sorted(folder.glob("*.bin"))
        hint = f" (pickled weights such as {binaries[0].name} are not read)" if binaries else ""
        raise ModelError(f"{folder} has no model.safetensors{hint}; get the checkpoint in safetensors form")
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path} is missing although {index.name} names it; finish the download")
    return paths


def _read_header(path: Path) -> list[TensorRecord]:
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    try:
        # Opening loads no weight, but checks every shape against its bytes, and their sum against the file.
        with safe_open(path, framework="numpy"):
            tensors = parse_local_safetensors_file_metadata(path).tensors
    except (OSError, SafetensorError, SafetensorsParsingError) as error:
        raise ModelError(f"{path} is truncated or not safetensors ({size} bytes); download it again") from error
    begin = size - max((info.data_offsets[1] for info in tensors.values()), default=0)
    return [
        TensorRecord(path, name, info.dtype, tuple(info.shape), *(begin + offset for offset in info.data_offsets))
        for name, info in tensors.items()
    ]
