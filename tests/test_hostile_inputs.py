"""Images, videos, questions and files of questions that are broken, huge or meant to harm: one line each, and little work."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.GifImagePlugin import GifImageFile

from vtexport.errors import InputError
from vtexport.measure.calibrate import read_pairs
from vtexport.measure.questions import read_items
from vtexport.measure.scoring import METRICS
from vtexport.models import decoding, pictures
from vtexport.models.conversation import read_messages
from vtexport.models.pictures import check_image, open_image, open_video, read_image
from vtexport.runtime.runner import Runner

QUESTION = "what digit is red?"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> Any:
    return read_image(io.BytesIO(data), "the image", "not readable; give another")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of any size whose pixels are few bytes; not all of them are there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def colours() -> Image.Image:
    steps = np.arange(0, 256, 4, dtype=np.uint8)
    return Image.fromarray(np.stack([*np.meshgrid(steps, steps[:48]), np.full((48, 64), 9, np.uint8)], axis=-1))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60_000, 1), "60000 x 1 pixels, more than 200 times as many in length as in width; crop it"),
        ((1, 60_000), "1 x 60000 pixels, more than 200 times"),
        ((13_400, 13_400), "has more than the 178000000 pixels that can be taken; make it smaller"),
        ((13_350, 13_350), "13350 x 13350 pixels, and 178000000 can be taken; make it smaller"),
        ((2**31 - 1, 2**31 - 1), "more than the 178000000 pixels"),
    ],
)
def test_images_are_refused_by_their_header(size: tuple[int, int], message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(*size))
    for attempt in (lambda: read(path.read_bytes()), lambda: check_image(path, "the image", "not readable")):
        with pytest.raises(InputError, match=message):
            attempt()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_images_are_read_as_transformers_reads_them(kind: str, colours: Image.Image) -> None:
    data = encoded(colours, kind)
    with Image.open(io.BytesIO(data)) as plain:
        assert read(data).tobytes() == plain.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_colour_modes(mode: str, kind: str, colours: Image.Image) -> None:
    try:
        data = encoded(Image.new(mode, (5, 4), 1) if mode == "LAB" else colours.convert(mode), kind)
        with Image.open(io.BytesIO(data)) as plain:
            expected = plain.convert("RGB").tobytes()
    except (OSError, KeyError):
        pytest.skip("Pillow writes no such file, or one that it cannot read")
    assert read(data).tobytes() == expected


@pytest.mark.parametrize("orientation", range(10))
def test_orientations(orientation: int, colours: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colours, "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as plain:
        assert read(data).tobytes() == ImageOps.exif_transpose(plain).convert("RGB").tobytes()


def test_transparent_palettes_warn_of_nothing(colours: Image.Image) -> None:
    image = colours.quantize(8)
    data = encoded(image, "PNG", transparency=bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(data).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind: str, micro_runner: Runner) -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    wide, narrow = Image.fromarray(values), Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    assert read(encoded(wide, kind)).tobytes() == narrow.tobytes()
    given, expected = (micro_runner.prompter.views(image).pixels for image in (wide, narrow))
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_have_no_white(kind: type, micro_runner: Runner) -> None:
    image = Image.fromarray(np.ones((4, 4), kind))
    with pytest.raises(InputError, match="32 bits per pixel, of which no number is known to be white"):
        read(encoded(image, "TIFF"))
    with pytest.raises(InputError, match="convert it to 8 bits"):
        micro_runner.prompter.views(image)


def test_formats_that_run_programs_are_no_images(monkeypatch: pytest.MonkeyPatch, colours: Image.Image) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for kind in ("EPS", "ICNS", "JPEG2000", "SPIDER", "PCX", "TGA"):
        image = colours.convert("F") if kind == "SPIDER" else colours.resize((64, 64))
        with pytest.raises(InputError, match="not readable"):
            read(encoded(image, kind))


def test_large_photographs_are_taken(
    monkeypatch: pytest.MonkeyPatch, colours: Image.Image, micro_runner: Runner
) -> None:
    """Above `WHOLE_PIXELS`, here of a small image, height and width are halved, whoever decoded it."""
    whole = micro_runner.prompter.views(colours.resize((300, 400))).pixels
    monkeypatch.setattr(pictures, "WHOLE_PIXELS", 100_000)
    image = colours.resize((300, 400))
    assert read(encoded(image, "PNG")).size == (150, 200)
    halved = micro_runner.prompter.views(image).pixels
    assert np.abs(halved - whole).mean() < 0.02
    np.testing.assert_array_equal(halved, micro_runner.prompter.views(read(encoded(image, "PNG"))).pixels)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return zlib.compress(b"\0" * (100 << 20), 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"fcTL", b"acTL"])
def test_metadata_cannot_unpack_to_gigabytes(kind: bytes, bomb: bytes) -> None:
    head = b"key\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0")
    data = encoded(Image.new("RGB", (4, 4)), "PNG")
    with contextlib.suppress(InputError):
        assert read(data[:33] + chunk(kind, head + bomb) + data[33:]).size == (4, 4)


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path, colours: Image.Image) -> None:
    data = encoded(colours.resize((4000, 4000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : data.rindex(b"\xff\xd9")][:12]
    assert read(data).size == (4000, 4000)
    with pytest.raises(InputError, match=r"the image has scans of 1[0-9] billion pixels together"):
        read(data[:-2] + scan * 700 + data[-2:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_no_damage_is_more_than_an_error(kind: str, colours: Image.Image) -> None:
    data, rng = bytearray(encoded(colours, kind)), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        for place in rng.integers(0, min(len(broken), 200), 3):
            broken[place] = rng.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with contextlib.suppress(InputError):
                assert read(bytes(broken)).mode == "RGB"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: "photo.png", "an image was given as str; give a PIL image"),
        (lambda: Path("photo.png"), "an image was given as PosixPath"),
        (lambda: b"bytes", "an image was given as bytes"),
        (lambda: None, "an image was given as NoneType"),
        (lambda: np.zeros((3, 40, 40), np.float32), r"an image was given as float32 \[3, 40, 40\]"),
        (lambda: [[Image.new("RGB", (4, 4))]], "an image was given as list"),
        (lambda: Image.new("RGB", (0, 4)), "has 0 x 4 pixels"),
        (lambda: Image.new("RGB", (4000, 1)), "more than 200 times"),
        (lambda: Image.new("L", (13_400, 13_400)), "13400 x 13400 pixels, and 178000000 can be taken"),
        (lambda: closed(), "an image cannot be decoded"),
        (lambda: Image.open(io.BytesIO(png(40, 40)[:-30])), "an image cannot be decoded"),
    ],
)
def test_what_python_gives_as_an_image(given: Callable[[], Any], message: str, micro_runner: Runner) -> None:
    with pytest.raises(InputError, match=message):
        micro_runner.ask([(given(), QUESTION)])


def closed() -> Any:
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (4, 4)), "PNG")))
    image.close()
    return image


def test_arrays_of_bytes_are_images(micro_runner: Runner, colours: Image.Image) -> None:
    for image in (colours, colours.resize((1, 1)), colours.resize((3, 100))):
        array = micro_runner.prompter.views(np.asarray(image)).pixels
        np.testing.assert_array_equal(array, micro_runner.prompter.views(image).pixels)


def test_of_a_video_only_the_frames_taken_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 6), (number, 0, 0)) for number in range(40)]
    made: list[int] = []
    monkeypatch.setattr(pictures, "_rgb", lambda image, name: made.append(1) or image.convert("RGB"))
    for kind in ("gif", "webp", "png"):
        path = tmp_path / f"clip.{kind}"
        options = {"lossless": True} if kind == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        made.clear()
        assert [frame.getpixel((0, 0))[0] for frame in open_video(path, 8)] == list(range(0, 40, 5)), kind
        assert len(made) == 8
    monkeypatch.setattr(decoding, "_DECODED_PIXELS", 36 * 48 - 1)
    with pytest.raises(InputError, match=r"has frames of .* make it smaller"):
        open_video(tmp_path / "clip.gif", 8)


def gif(*frames: tuple[int, int, int, int], loop: bytes = b"\3\1\0\0\0") -> bytes:
    """A GIF with a screen of 8 x 6 and frames at (left, top) of (width, height), of which only a few pixels are there."""
    head = b"GIF89a" + struct.pack("<HHB2x", 8, 6, 0x80) + b"\0\0\0\xff\xff\xff" + b"!\xff\x0bNETSCAPE2.0" + loop
    replaced = b"!\xf9\x04\x08\0\0\0\0"
    return head + b"".join(replaced + b"," + struct.pack("<4HB", *one, 0) + b"\2\1\x4c\0" for one in frames) + b";"


def test_frames_of_a_gif_that_reach_beyond_its_screen_are_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, small = tmp_path / "clip.gif", (0, 0, 8, 6)
    path.write_bytes(gif(*[small] * 5, (0, 8000, 9000, 8000), *[small] * 2))
    with monkeypatch.context() as patched:
        patched.setattr(GifImageFile, "seek", lambda self, number: pytest.fail("a frame was decoded"))
        # That its frames are counted needs no decoding, but goes back to the first one.
        patched.setattr(GifImageFile, "n_frames", 8)
        with pytest.raises(InputError, match="has 9000 x 16000 pixels, and 8388608 can be taken; make it smaller"):
            open_video(path, 8)
    # 4,000 frames of 5 million pixels are 20 billion to decode, whatever size the screen is said to have.
    path.write_bytes(gif(*[small] * 3999, (0, 0, 2500, 2000)))
    with pytest.raises(InputError, match="has frames of 20 billion pixels together"):
        open_video(path, 4000)


def test_a_frame_that_hides_in_a_comment_is_refused_when_pillow_finds_it(tmp_path: Path) -> None:
    """A loop without data makes Pillow take what follows, here "!", for the length of a block."""
    path = tmp_path / "clip.gif"
    frame = b"," + struct.pack("<4HB", 0, 0, 6000, 6000, 0) + b"\2\1\x4c\0"
    comment = (bytes(31) + b"\0" + frame).ljust(200, b"\0")
    path.write_bytes(gif(*[(0, 0, 8, 6)] * 8, loop=b"\0" + b"!\xfe" + bytes([len(comment)]) + comment + b"\0"))
    with Image.open(path) as opened:
        decoding.check_frames(opened, 7, "clip")
        if opened.size == (8, 6):
            pytest.skip("this Pillow sees the comment")
    with pytest.raises(InputError, match="has 6000 x 6000 pixels"):
        open_video(path, 8)


@pytest.mark.parametrize("kind", ["gif", "folder"])
def test_large_frames_of_a_video_are_halved(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (80, 60), (40 * number, 0, 0)) for number in range(4)]
    path = tmp_path / kind
    if kind == "gif":
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    else:
        path.mkdir()
        for number, frame in enumerate(frames):
            frame.save(path / f"{number}.png")
    assert [frame.size for frame in open_video(path, 4)] == [(80, 60)] * 4
    for most, size in ((4 * 80 * 60, (80, 60)), (4 * 80 * 60 - 1, (40, 30)), (4 * 40 * 30 - 1, (20, 15))):
        monkeypatch.setattr(pictures, "VIDEO_PIXELS", most)
        halved = open_video(path, 4)
        assert [frame.size for frame in halved] == [size] * 4
        assert [frame.getpixel((0, 0)) for frame in halved] == [(40 * number, 0, 0) for number in range(4)]


def test_a_folder_of_frames_may_hold_other_files(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    (frames / "folder.png").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(frames / f"{number}.png")
    (frames / "4.PNG").symlink_to(frames / "1.png")
    (frames / "5.png").symlink_to(tmp_path / "nowhere")
    (frames / "readme.txt").write_text("frames")
    (frames / ".DS_Store").write_bytes(b"\0")
    (frames / ".0.png").write_bytes(b"\0")
    assert [frame.getpixel((0, 0))[0] for frame in open_video(frames, 4)] == [0, 1, 2, 1]
    with pytest.raises(InputError, match="has 4 frames, this model takes 5"):
        open_video(frames, 5)
    (frames / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2\.png: not a readable image"):
        open_video(frames, 4)


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "a\nb"])
@pytest.mark.parametrize("reader", [open_image, lambda path: open_video(path, 8)])
def test_names_of_no_file(name: str, reader: Callable[[Path], Any]) -> None:
    with pytest.raises(InputError, match="no such"):
        reader(Path(name))


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "5", None, float("nan")])
def test_numbers_of_new_tokens(count: Any, micro_runner: Runner, colours: Image.Image) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens is .*; give a whole number of 1 or more"):
        micro_runner.ask([(colours, QUESTION)], count)
    with pytest.raises(InputError, match="max_new_tokens is"):
        list(micro_runner.stream(colours, QUESTION, count))


@pytest.mark.parametrize("count", [10**6, 10**9, 10**30])
def test_more_new_tokens_than_positions(count: int, micro_runner: Runner, colours: Image.Image) -> None:
    with pytest.raises(InputError, match="positions"):
        micro_runner.ask([(colours, QUESTION)], count)


@pytest.mark.parametrize("pairs", [[], (), None, "ask", [1], ["ab"], [("image",)], [(1, 2, 3)], {}])
def test_what_is_no_list_of_pairs(pairs: Any, micro_runner: Runner) -> None:
    with pytest.raises(InputError, match="give a list such as"):
        micro_runner.ask(pairs)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (None, "a conversation is a list of messages, not NoneType"),
        (5, "not int"),
        (b"what?", "not bytes"),
        ("\ud800 what?", "the prompt has half of a character in it"),
        ("a " * (1 << 20), "more than 4096 parts or 1048576 characters"),
        ([{"role": "user", "content": "a"}] * 5000, "has 5000 messages, and 4096 can be taken"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}], "more than 4096 parts"),
        ([{"role": "u" * 10**6, "content": "a"}], "message 1 has role 'uuu"),
        ([{"role": "user", "content": [{"type": {"a": "b" * 10**6}}]}], "part 1 of message 1 has type of type dict"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "part 1 of message 1"),
        ([{"role": "user", "content": {"a": 1}}], "content of type dict"),
        ([[["user"]]], "message 1 is of type list"),
    ],
)
def test_questions(question: Any, message: str, micro_runner: Runner, colours: Image.Image) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        micro_runner.ask([(colours, question)])
    assert len(str(refusal.value)) < 400


LINES = {
    "no UTF-8": b'{"image": "photo.png", "prompt": "\xff"}',
    "UTF-16": '{"image": "photo.png"}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep key": b'{"image": "photo.png", "prompt": "a", "answer": "b", "id": ' + b"[" * 100_000,
    "long": b'{"image": "' + b"a" * (1 << 20) + b'"}',
    "number": b'{"image": 5, "prompt": "a", "answer": "b"}',
    "lists": b'{"image": [["photo.png"]], "prompt": "a", "answer": "b"}',
    "null": b'{"image": null, "prompt": "a", "answer": "b"}',
    "no prompt": b'{"image": "photo.png"}',
    "no object": b"5",
    "cut": b'{"image": "photo.png", "prompt": "a"',
    "surrogate": rb'{"image": "photo.png", "prompt": "\ud800", "answer": "b"}',
    "NUL": rb'{"image": "\u0000", "prompt": "a", "answer": "b"}',
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_files(name: str, photo: Path, tmp_path: Path, micro_runner: Runner) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(LINES[name])
    with pytest.raises(InputError, match=r"data\.jsonl, line 1"):
        read_items(path, METRICS["exact"])

    def use() -> None:
        for pair in read_pairs(path):
            micro_runner.prompter.open_pictures(pair.images)

    with pytest.raises(InputError) as refusal:
        use()
    assert len(str(refusal.value)) < 500


def test_a_file_of_many_lines_is_not_held(photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"image": "{photo}", "prompt": "a", "answer": "b"}}\n\n' * 500)
    read_bytes: list[int] = []
    items = read_items(path, METRICS["exact"], advance=read_bytes.append)
    assert len(items) == 500
    assert sum(read_bytes) == path.stat().st_size
    assert (items[-1].id, items[-1].images) == (999, (photo,))
    assert len(read_pairs(path)) == 500
    for nowhere in (tmp_path, tmp_path / "nowhere", Path("\0")):
        with pytest.raises(InputError, match="JSON lines"):
            read_items(nowhere, METRICS["exact"])


@pytest.mark.parametrize("data", [b"\xff", b"[" * 100_000, b"{}", b"", b'["\\ud800"', b" " * (9 << 20), b"NaN"])
def test_files_of_messages(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "messages.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"messages\.json"):
        read_messages(path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(InputError, match="stdin"):
        read_messages(Path("-"))
