"""Image files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from vtexport.models.pictures import FORMATS, read_image


def seeds(place: Path) -> list[bytes]:
    picture = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind, options in [(kind, {}) for kind in FORMATS] + [("PNG", {"exif": exif}), ("JPEG", {"progressive": True})]:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        found.append(stream.getvalue())
    return found


def one(data: bytes, place: Path) -> None:
    read_image(io.BytesIO(data), "the image", "not readable; give another", 1 << 20)
