"""Indexes of shards."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fuzz.targets.safetensors import file_of
from vtexport.models.checkpoint import Checkpoint

_INDEX = "model.safetensors.index.json"


def seeds(place: Path) -> list[bytes]:
    """Indexes of one shard and of two."""
    one, two = "model-1.safetensors", "model-2.safetensors"
    return [json.dumps({"weight_map": names}).encode() for names in ({"a": one}, {"a": one, "b": two}, {})]


def one(data: bytes, place: Path) -> None:
    """Open the checkpoint that it describes, whose first shard is there."""
    shard = place / "model-1.safetensors"
    shard.write_bytes(file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    (place / _INDEX).write_bytes(data)
    try:
        for record in Checkpoint.open(place).tensors.values():
            assert record.path.parent == place
    finally:
        shard.unlink()
        (place / _INDEX).unlink()
