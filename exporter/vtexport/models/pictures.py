"""Images and videos, from files or as PIL images: what is too large is refused before any of it is decoded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError, first_line
from vtexport.models.decoding import FRAME_PIXELS, MOST_PIXELS, check_frames, check_scans, check_size

#: formats of images; Pillow knows more, some of which run other programs (EPS), unpack archives (FITS) or are documents
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: pixels up to which an image goes to the processor as it is; it makes several copies of them
WHOLE_PIXELS = 1 << 26
#: pixels per side up to which an image goes as it is to a processor that pads it to a square
SQUARE = 1 << 13
#: pixels that the frames of one video keep together; larger ones are halved. Eight of 2560 x 1440 fit
VIDEO_PIXELS = 1 << 25
_ANIMATIONS = ("GIF", "WEBP", "PNG")
_STILLS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
_ORIENTATION = 0x0112
# `catch_warnings` changes what the whole process shows, and a server opens images in several threads.
_QUIET = threading.Lock()


def open_image(path: Path) -> Any:
    """The image in file `path`, as an RGB PIL image, turned as its EXIF says.

    Raises:
        InputError: no such file, not an image, or one that is too large (`check_size`).
    """
    if not _exists(path):
        raise InputError(f"{path}: no such image; check the path given with --image")
    return read_image(path, str(path), f"{path}: not a readable image; give a PNG or JPEG file")


def read_image(file: Any, name: str, otherwise: str, most: int = MOST_PIXELS) -> Any:
    """The image in `file`, a path or a binary stream, as an RGB PIL image, turned as its EXIF says.

    Its pixels are those of transformers' `load_image`: transparency is dropped. But 16 bits per pixel become their upper
    8, where Pillow would make nearly all of them white. More than `WHOLE_PIXELS` pixels are halved in height and width.

    Args:
        file: the file.
        name: what to call it if it is too large.
        otherwise: the whole line for any other error.
        most: pixels at most.

    Raises:
        InputError: not an image, or one that is too large.
    """
    with _refusing(otherwise), _opened(file, FORMATS, name, most) as opened:
        if opened.format in ("JPEG", "MPO"):
            check_scans(opened, name)
        # Decoded first, by several threads at once: some formats have their EXIF behind the pixels.
        with _quietly() if opened.format == "TIFF" else nullcontext():
            opened.load()
        with _quietly():
            orientation = opened.getexif().get(_ORIENTATION)
        picture = _turned(_bounded(_rgb(opened, name), WHOLE_PIXELS), orientation)
        return picture.copy() if picture is opened else picture


def check_image(path: Path, name: str, otherwise: str) -> None:
    """Refuse what `read_image` would refuse, as far as the file's header tells; nothing is decoded.

    Raises:
        InputError: not an image, or one that is too large.
    """
    with _refusing(otherwise), _opened(path, FORMATS, name):
        pass


def open_video(path: Path, frames: int) -> list[Any]:
    """Frames of a video at equal distances, RGB PIL images; no other frames are held.

    Frames of more than `VIDEO_PIXELS` together are halved in height and width until they are not.

    Args:
        path: an animated image (GIF, WebP, PNG), or a folder of images in the order of their names. Folders, hidden files
            and others that no image is called like may lie beside them.
        frames: how many; the video is cut into as many equal parts, and the first frame of each is taken.

    Raises:
        InputError: no such file, no video, one that is too large, or fewer frames.
    """
    most = VIDEO_PIXELS // frames
    if _exists(path, folder=True):
        stills = sorted(file for file in path.iterdir() if _is_still(file))
        return [_bounded(open_image(stills[number]), most) for number in _chosen(path, len(stills), frames)]
    if not _exists(path):
        raise InputError(f"{path}: no such video; check the path given with --image")
    otherwise = (
        f"{path}: not a readable animation; give a GIF, WebP or PNG with frames, or a folder of frames (such as ffmpeg -i "
        "clip.mp4 -vf fps=1 frames/%03d.png writes)"
    )
    with _refusing(otherwise), _opened(path, _ANIMATIONS, str(path), FRAME_PIXELS) as opened:
        chosen = _chosen(path, getattr(opened, "n_frames", 1), frames)
        check_frames(opened, chosen[-1], str(path))
        found = []
        for number in range(chosen[-1] + 1):
            opened.seek(number)
            # Again, because Pillow passes over some broken blocks in its own way; it decodes a frame at the next seek.
            check_size(opened.size, str(path), FRAME_PIXELS)
            if number not in chosen:
                continue
            frame = _bounded(_rgb(opened, str(path)), most)
            found.append(frame.copy() if frame is opened else frame)
        return found


def as_picture(given: Any) -> Any:
    """`given`, from Python, as a PIL image that the processor can take.

    A PIL image goes to the processor as it is, which knows what to do with transparency, unless it has 16 bits per pixel
    or more than `WHOLE_PIXELS`; see `read_image`.

    Raises:
        InputError: neither a PIL image nor uint8 [H, W, 3], too large, or one that cannot be decoded any more.
    """
    from PIL import Image

    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3:
        check_size((given.shape[1], given.shape[0]), "an image")
        given = Image.fromarray(given)
    if not isinstance(given, Image.Image):
        shown = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
        raise InputError(f"an image was given as {shown}; give a PIL image, such as PIL.Image.open(path) returns")
    check_size(given.size, "an image")
    try:
        given.load()
        transparent = "A" in given.getbands() or "transparency" in given.info
        return _bounded(given if transparent else _rgb(given, "an image"), WHOLE_PIXELS)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type for broken files
        raise InputError(
            f"an image cannot be decoded ({first_line(error)}); give a whole image that is open"
        ) from error


def _exists(path: Path, *, folder: bool = False) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has NUL in it
        return False


def _is_still(file: Path) -> bool:
    return file.suffix.lower() in _STILLS and not file.name.startswith(".") and file.is_file()


def _chosen(path: Path, count: int, frames: int) -> list[int]:
    """The numbers of the frames that are taken of `count`."""
    if count < frames:
        raise InputError(f"{path} has {count} frames, this model takes {frames}; give a longer video")
    return [number * count // frames for number in range(frames)]


@contextmanager
def _refusing(otherwise: str) -> Iterator[None]:
    """Turn whatever Pillow raises into InputError with the line `otherwise`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type for broken files
        raise InputError(otherwise) from error


@contextmanager
def _opened(file: Any, formats: tuple[str, ...], name: str, most: int = MOST_PIXELS) -> Iterator[Any]:
    """A file of which Pillow has read the header, and whose size is taken."""
    from PIL import Image

    with _quietly():
        try:
            opened = Image.open(file, formats=formats)
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} has more than the {most} pixels that can be taken; make it smaller") from error
    with opened:
        check_size(opened.size, name, most)
        yield opened


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide what Pillow warns of: sizes below the bound, and metadata that cannot be read."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rgb(image: Any, name: str) -> Any:
    """`image` as RGB; itself if it is."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _upper(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        # These formats have 16 bits, for which Pillow has another mode as well.
        return _upper(image)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32 bits per pixel, of which no number is known to be white; convert it to 8 bits per channel"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours; by itself, Pillow would warn that it drops the transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upper(image: Any) -> Any:
    """A grey image of 16 bits by the upper 8, as Pillow itself reads coloured ones."""
    from PIL import Image

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")


def _bounded(image: Any, most: int) -> Any:
    """`image`, halved until it has at most `most` pixels; every model scales it to far fewer."""
    return _halved(image, lambda factor: image.width * image.height <= most * factor**2)


def within(image: Any, side: int) -> Any:
    """`image`, halved until neither of its sides has more than `side` pixels."""
    return _halved(image, lambda factor: max(image.size) <= side * factor)


def _halved(image: Any, small: Callable[[int], bool]) -> Any:
    """`image`, reduced by the least power of two that is `small` enough; itself if 1 is."""
    factor = 1
    while not small(factor):
        factor *= 2
    if factor == 1:
        return image
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).reduce(factor)


def _turned(image: Any, orientation: Any) -> Any:
    """`image`, turned or mirrored as EXIF's orientation, 1 to 8, says."""
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    method = methods.get(orientation)
    return image if method is None else image.transpose(method)
