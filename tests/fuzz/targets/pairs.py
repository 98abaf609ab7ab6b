"""Pairs to calibrate on."""

from __future__ import annotations

from pathlib import Path

from vtexport.measure.calibrate import read_pairs


def seeds(place: Path) -> list[bytes]:
    return [
        b'{"image": "a.png", "prompt": "what?"}\n\n{"image": ["a.png", "b/c.png"], "prompt": "\\u00e9"}\n',
        b'\xef\xbb\xbf{"prompt": "what?", "image": "a.png", "more": [1, 2.5, null, {"a": true}]}\r\n',
    ]


def one(data: bytes, place: Path) -> None:
    path = place / "pairs.jsonl"
    path.write_bytes(data)
    try:
        read_pairs(path)
    finally:
        path.unlink()
