"""Headers of safetensors files, with tensors behind them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from vtexport.models.checkpoint import Checkpoint


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with that header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def seeds(place: Path) -> list[bytes]:
    """Two tensors, one tensor with metadata, and none."""
    first = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    second = {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]}
    return [
        file_of({"a": first, "b": second}, bytes(16)),
        file_of({"__metadata__": {"format": "pt"}, "a": first}, bytes(8)),
        file_of({}),
    ]


def one(data: bytes, place: Path) -> None:
    """Open it, and read the bytes of each tensor where its record says."""
    path = place / "model.safetensors"
    path.write_bytes(data)
    try:
        for record in Checkpoint.open(place).tensors.values():
            assert 8 <= record.start <= record.end <= len(data)
    finally:
        path.unlink()
