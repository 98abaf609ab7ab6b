"""Questions with right answers: those of a file of JSON lines, or micro-llava's held-out ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from vtexport.arrays import Array
from vtexport.errors import InputError, first_line
from vtexport.measure.scoring import Metric
from vtexport.micro import heldout
from vtexport.models.pictures import check_image

if TYPE_CHECKING:
    from vtexport.models.prompt import Prompter

#: bytes of a line at most
LINE_BYTES = 1 << 20
_EXAMPLE = '{"image": "photo.png", "prompt": "what is it?", "answers": ["a cat"]}'


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: what a report calls it: the file's `id`, or the number of its line.
        prompt: the question.
        answers: the right answers, at least one.
        images: files of its images, or of its videos.
        picture: the image itself in place of files, uint8 [H, W, 3].
        kind: the kind of question, by which results are given too; "" for none.
        where: file and line, for messages.
    """

    id: str | int
    prompt: str
    answers: tuple[str, ...]
    images: tuple[Path, ...] = ()
    picture: Array | None = None
    kind: str = ""
    where: str = ""

    def pictures(self, prompter: Prompter) -> Any:
        """Its images as `Runner.ask` takes them.

        Raises:
            InputError: a file is no image, or the model takes another number of images per prompt.
        """
        if self.picture is None:
            return prompter.open_pictures(self.images)
        from PIL import Image

        return Image.fromarray(self.picture)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the file."""

    image: str | list[str]
    prompt: str
    answer: str | UnsetType = UNSET
    answers: list[str] | UnsetType = UNSET
    id: str | int | UnsetType = UNSET


def heldout_items(limit: int | None = None, *, blank: bool = False) -> list[Item]:
    """The first `limit` of micro-llava's held-out questions, all if it is None; `blank` blacks their images out.

    Raises:
        InputError: a limit out of range.
    """
    _check_limit(limit, heldout.NUM_QUESTIONS)
    return [
        Item(
            number,
            example.question.text,
            (example.question.answer,),
            picture=example.image * (0 if blank else 1),
            kind=example.question.kind,
            where=f"held-out question {number}",
        )
        for number, example in enumerate(heldout.examples(limit or heldout.NUM_QUESTIONS), start=1)
    ]


def read_items(
    path: Path, metric: Metric, limit: int | None = None, advance: Callable[[int], None] = lambda _n: None
) -> list[Item]:
    """The first `limit` questions of a file of JSON lines, all if it is None; every line of it is checked.

    Args:
        path: the file. Each line is an object with `image` (a path relative to the file, or a list of them), `prompt`,
            `answers` (a list) or `answer`, and perhaps `id`.
        metric: how answers will be scored.
        limit: how many questions.
        advance: called with the bytes read.

    Raises:
        InputError: the file is missing, empty or not UTF-8; a line is no such object, repeats an `id`, has answers that
            the metric cannot score against, or names a file that is missing or no image; a limit out of range.
    """
    items: list[Item] = []
    known: dict[str | int, str] = {}
    for number, line in json_lines(path, advance):
        items.append(_item(path, number, line, metric))
        before = known.setdefault(items[-1].id, items[-1].where)
        if before != items[-1].where:
            raise InputError(f"{items[-1].where}: the id {items[-1].id!r} is taken by {before}; give another")
    if not items:
        raise InputError(f"{path} holds no question; write lines such as {_EXAMPLE}")
    _check_limit(limit, len(items))
    return items[:limit]


def json_lines(path: Path, advance: Callable[[int], None] = lambda _n: None) -> Iterator[tuple[int, bytes]]:
    """The lines of a user's file that are not blank, with their numbers; no more than one is held.

    Args:
        path: the file; it may be a pipe.
        advance: called with the bytes read.

    Raises:
        InputError: it cannot be read, or a line has more than `LINE_BYTES`.
    """
    try:
        # Only newlines end a line: text may hold other characters at which `splitlines` would cut it.
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > LINE_BYTES:
                    raise InputError(
                        f"{path}, line {number}: more than {LINE_BYTES} bytes; write one object in each line"
                    )
                advance(len(line))
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield number, text.rstrip(b"\r\n")
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: {reason}; give a file of JSON lines as --data") from error


def _check_limit(limit: int | None, number: int) -> None:
    if limit is not None and not 1 <= limit <= number:
        raise InputError(f"--limit {limit} is out of range; give 1 to {number}")


def _item(path: Path, number: int, data: bytes, metric: Metric) -> Item:
    """The question of line `number`."""
    where = f"{path}, line {number}"
    try:
        line = _decoded(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"{where}: {first_line(error)}; write a line such as {_EXAMPLE}") from error
    if not line.prompt.strip():
        raise InputError(f"{where}: the prompt is empty; ask something about the image")
    if (line.answer is UNSET) == (line.answers is UNSET):
        many = "no answers" if line.answer is UNSET else "both answer and answers"
        raise InputError(f"{where}: it has {many}; give one of the two keys")
    answers = [line.answer] if isinstance(line.answer, str) else line.answers
    assert isinstance(answers, list), "one of the two is set"
    if not answers or not all(answer.strip() for answer in answers):
        raise InputError(f"{where}: {'an answer' if answers else 'the list of answers'} is empty; give what is right")
    if trouble := metric.trouble(answers):
        raise InputError(f"{where}: it {trouble}")
    named = [line.image] if isinstance(line.image, str) else line.image
    if not named:
        raise InputError(f"{where}: the list of images is empty; name an image file")
    images = tuple(path.parent / name for name in named)
    for name, image in zip(named, images, strict=True):
        _check_image(where, name, image)
    return Item(number if line.id is UNSET else line.id, line.prompt, tuple(answers), images, where=where)


def _decoded(data: bytes) -> _Line:
    """`data` as a line.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    try:
        data.decode("utf-8")
        return msgspec.json.decode(data, type=_Line)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"it is not UTF-8 (byte {error.start + 1} of the line)") from error


def _check_image(where: str, name: str, image: Path) -> None:
    """Refuse a path at which there is no image by its header, and no folder, which may hold a video's frames."""
    try:
        if image.is_dir():
            return
        there = image.is_file()
    except (OSError, ValueError):  # a name that is too long, or has NUL in it
        there = False
    if not there:
        raise InputError(f"{where}: no such image: {image}; paths are relative to the file of questions")
    check_image(image, f"{where}: {name!r}", f"{where}: {name!r} is not a readable image; give a PNG or JPEG file")
