"""Animations."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from vtexport.models.pictures import open_video


def seeds(place: Path) -> list[bytes]:
    frames = [Image.new("RGB", (8, 6), (25 * number, 9, 9)) for number in range(9)]
    found = []
    for kind in ("GIF", "WEBP", "PNG"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        found.append(stream.getvalue())
    return found


def one(data: bytes, place: Path) -> None:
    path = place / "clip"
    path.write_bytes(data)
    try:
        open_video(path, 8)
    finally:
        path.unlink()
