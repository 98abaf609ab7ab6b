"""Where each tensor of a checkpoint lies, read from safetensors headers; no weight is loaded."""

from __future__ import annotations

import json
import math
import os.path
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vtexport.errors import ModelError, first_line
from vtexport.models.bounds import shown
from vtexport.reading import Unreadable, read_json

#: safetensors dtype -> the dtype of the engine that its numbers go into
NEAREST = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "fp16"}
#: dtype of an engine -> the safetensors dtype whose bytes it takes as they are
AS_STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


# The largest headers and indexes that belong to models have some hundred kB, and the safetensors library reads headers
# up to 100 MB, which would become gigabytes here.
_HEADER_BYTES = _INDEX_BYTES = 16 << 20
_SHARDS = 1024
_AGAIN = "; get the checkpoint again"
# Bytes per number of safetensors' dtypes.
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_Extent = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Index(msgspec.Struct):
    """A safetensors index: which file has which tensor."""

    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    """A tensor as a safetensors header describes it."""

    dtype: Literal[tuple(_BYTES)]  # type: ignore[valid-type]  # the keys of a table
    shape: Annotated[tuple[_Extent, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Extent, _Extent]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


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
            ModelError: no safetensors, a missing shard, two tensors of a name, or a file that is not as its header says.
        """
        return cls.of_files(folder, _shards(folder))

    @classmethod
    def of_files(cls, folder: Path, paths: Iterable[Path]) -> Checkpoint:
        """As `open`, for the files in `paths`."""
        tensors: dict[str, TensorRecord] = {}
        for path in paths:
            for record in _read_header(path):
                if record.name in tensors:
                    raise ModelError(
                        f"{path} has {shown(record.name)}, as {tensors[record.name].path.name} has{_AGAIN}"
                    )
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
    if index.exists():
        try:
            names = sorted(set(read_json(index, _INDEX_BYTES, kind=_Index).weight_map.values()))
        except Unreadable as error:
            raise ModelError(f"{index} is not a safetensors index ({error}); download it again") from error
        # The names come from a file, so a name that leads out of the folder is refused. Links, of which a hub's cache
        # is made, are followed.
        strange = next((name for name in names if Path(name).name != name or not name.endswith(".safetensors")), None)
        if strange is not None:
            raise ModelError(f"{index} names {shown(strange)}, a file outside the folder or none of weights{_AGAIN}")
        if not names or len(names) > _SHARDS:
            raise ModelError(f"{index} names {len(names)} files, not 1 to {_SHARDS}{_AGAIN}")
        paths = [folder / name for name in names]
    elif single.is_file():
        paths = [single]
    else:
        binaries = sorted(folder.glob("*.bin"))
        hint = f" (pickled weights such as {binaries[0].name} are not read)" if binaries else ""
        raise ModelError(f"{folder} has no model.safetensors{hint}; get the checkpoint in safetensors form")
    for path in paths:
        # A name may be longer than file systems take, too.
        if not os.path.exists(path):
            raise ModelError(f"{shown(str(path))} is missing although {index.name} names it; finish the download")
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file{_AGAIN}")
    return paths


def _read_header(path: Path) -> list[TensorRecord]:
    """The tensors in `path`: no two of a name, one behind the other without gaps up to the end, of dtypes that are known."""
    size = path.stat().st_size
    broken = f"{path} is truncated or not safetensors ({size} bytes"
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES, size - 8):
                raise Unreadable(f"its header would have {length}")
            header = json.loads(file.read(length), object_pairs_hook=_no_doubles)
        if not isinstance(header, dict):
            raise Unreadable("its header is no object")
        header.pop("__metadata__", None)
        entries = {name: msgspec.convert(entry, _Entry) for name, entry in header.items()}
    except (OSError, struct.error, ValueError, RecursionError, msgspec.ValidationError) as error:
        raise ModelError(f"{broken}: {first_line(error)}); download it again") from error
    begin, end = 8 + length, 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        first, last = entry.data_offsets
        if first != end or last - first != entry.bytes:
            raise ModelError(f"{broken}: {shown(name)} is not where and as large as it should be); download it again")
        end = last
    if begin + end != size:
        raise ModelError(f"{broken}, but its header says {begin + end}); download it again")
    return [
        TensorRecord(path, name, one.dtype, one.shape, *(begin + offset for offset in one.data_offsets))
        for name, one in entries.items()
    ]


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose names must differ: which of two of a name counts, readers do not agree on."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("a name occurs twice")
    return found
