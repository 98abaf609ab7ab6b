"""What decoding an image or a video would take, told by its headers: what takes too much is refused before any of it is done."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from vtexport.errors import InputError

#: pixels of an image at most, about as many as Pillow itself decodes; three bytes each
MOST_PIXELS = 178_000_000
#: how many times longer than wide an image may be. Processors scale the short side to S pixels before they crop, so an
#: image of aspect a becomes one of a · S² pixels: at 200 about 25 million, as many as a camera's
MOST_ASPECT = 200
#: pixels of a frame of an animation, of which Pillow holds several copies; 3840 x 2160 fit
FRAME_PIXELS = 1 << 23
# Decoding is the work that such files can ask for without end: frames in which each rests on the ones before, and scans
# of a progressive JPEG, each of which passes over the whole image. Both times pixels.
_DECODED_PIXELS = 10_000_000_000


def check_size(size: tuple[int, int], name: str, most: int = MOST_PIXELS) -> None:
    """Refuse an image, of which only the header is read yet, by its width and height.

    Raises:
        InputError: it has more than `most` pixels, is longer than `MOST_ASPECT` times its width, or has no pixels.
    """
    width, height = size
    if min(size) < 1:
        raise InputError(f"{name} has {width} x {height} pixels; give an image with some")
    if width * height > most:
        raise InputError(f"{name} has {width} x {height} pixels, and {most} can be taken; make it smaller")
    if max(size) > MOST_ASPECT * min(size):
        raise InputError(
            f"{name} has {width} x {height} pixels, more than {MOST_ASPECT} times as many in length as in width; crop it"
        )


def check_scans(opened: Any, name: str) -> None:
    """Refuse a JPEG, a PIL image that is open, if it passes over its pixels too often.

    Raises:
        InputError: it does.
    """
    file, scans, last = opened.fp, 0, b""
    place = file.tell()
    file.seek(0)
    while block := file.read(1 << 20):
        # In compressed data, 0xff is never followed by 0xda.
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(place)
    _check_work(scans * opened.width * opened.height, name, "scans")


def check_frames(opened: Any, last: int, name: str) -> None:
    """Refuse an animation, a PIL image that is open, if its frames, up to number `last`, are too large.

    Raises:
        InputError: they are, one or all together.
    """
    size = _gif_extent(opened.fp) if opened.format == "GIF" else opened.size
    check_size(size, name, FRAME_PIXELS)
    _check_work((last + 1) * size[0] * size[1], name, "frames")


def _check_work(pixels: int, name: str, parts: str) -> None:
    if pixels > _DECODED_PIXELS:
        raise InputError(
            f"{name} has {parts} of {pixels / 1e9:.0f} billion pixels together, and {_DECODED_PIXELS / 1e9:.0f} can be "
            "taken; make it smaller"
        )


def _gif_extent(file: BinaryIO) -> tuple[int, int]:
    """The width and height that hold the screen of a GIF and all its frames.

    GIF89a (section 20) has each frame lie on the screen. Pillow makes the screen larger instead, and a frame of a few
    bytes can ask for gigabytes as soon as it is reached.
    """
    place = file.tell()
    file.seek(6)
    width, height, flags = struct.unpack("<HHB2x", file.read(7))
    _skip_palette(file, flags)
    while (mark := file.read(1)) not in (b"", b";"):
        if mark == b"!":
            file.read(1)
            _skip_data(file)
        elif mark == b",":
            left, top, across, down, flags = struct.unpack("<4HB", file.read(9))
            width, height = max(width, left + across), max(height, top + down)
            _skip_palette(file, flags)
            file.read(1)
            _skip_data(file)
    file.seek(place)
    return width, height


def _skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << (flags & 7) + 1, 1)


def _skip_data(file: BinaryIO) -> None:
    """Pass blocks of data, each after its length, up to one of no length."""
    while (length := file.read(1)) not in (b"", b"\0"):
        file.seek(length[0], 1)
