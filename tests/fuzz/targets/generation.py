"""generation_config.json, which gives end tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoints import MICRO
from vtexport.models.families import read_spec


def seeds(place: Path) -> list[bytes]:
    """One end token, several, and none."""
    return [b'{"bos_token_id": 1, "eos_token_id": 2}', b'{"eos_token_id": [2, 3]}', b'{"eos_token_id": null}', b"{}"]


def one(data: bytes, place: Path) -> None:
    """Read the geometry of micro-llava with it."""
    config, path = place / "config.json", place / "generation_config.json"
    shutil.copyfile(MICRO / "config.json", config)
    path.write_bytes(data)
    try:
        ids = read_spec(place).eos_token_ids
        assert all(type(token) is int and 0 <= token < 384 for token in ids)
    finally:
        config.unlink()
        path.unlink()
