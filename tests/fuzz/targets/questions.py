"""Questions with right answers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vtexport.measure.questions import read_items
from vtexport.measure.scoring import METRICS


def seeds(place: Path) -> list[bytes]:
    return [
        b'{"image": "a.png", "prompt": "what?", "answer": "b", "id": 7}\n{"image": ["a.png"], "prompt": "who?", '
        b'"answers": ["c", "d"], "id": "x"}\n'
    ]


def one(data: bytes, place: Path) -> None:
    path, image = place / "data.jsonl", place / "a.png"
    path.write_bytes(data)
    Image.new("RGB", (4, 4)).save(image)
    try:
        read_items(path, METRICS["exact"])
    finally:
        path.unlink()
        image.unlink()
