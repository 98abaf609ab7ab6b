"""A request of Triton's as an image and a question."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.models.conversation import Question
from vtexport.models.pictures import read_image
from vtexport.reading import Unreadable, parse_json
from vtexport.runtime.runner import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        pictures: PIL images, one per picture or per frame.
        question: a question, or a conversation's messages.
        max_new_tokens: tokens at most.
        stream: whether the answer goes out piece by piece.
    """

    pictures: list[Any]
    question: Question
    max_new_tokens: int
    stream: bool


def read(given: Mapping[str, Array]) -> Asked:
    """What a request asks.

    Args:
        given: the inputs that it has, [1, n] each; texts as objects of type bytes.

    Raises:
        InputError: an input that cannot be read, or has several rows, or a question that is missing.
    """
    for name, array in given.items():
        if len(array) != 1:
            raise InputError(f"{name} has {len(array)} rows; send a request for each question")
        if not array.size:
            raise InputError(f"{name} is empty; give a value, or leave it out")
    if "IMAGE" not in given:
        raise InputError("a request has no IMAGE; give the bytes of a PNG or JPEG file")
    if ("PROMPT" in given) == ("MESSAGES" in given):
        raise InputError("a request has PROMPT, a question, or MESSAGES, a conversation as JSON; give one of them")
    count = int(given["MAX_NEW_TOKENS"][0, 0]) if "MAX_NEW_TOKENS" in given else MAX_NEW_TOKENS
    if count < 1:
        raise InputError(f"MAX_NEW_TOKENS is {count}; give 1 or more")
    question = _text(given, "PROMPT") if "PROMPT" in given else _messages(_text(given, "MESSAGES"))
    stream = bool(given["STREAM"][0, 0]) if "STREAM" in given else True
    pictures = [_picture(data, number) for number, data in enumerate(given["IMAGE"][0], start=1)]
    return Asked(pictures, question, count, stream)


def _text(given: Mapping[str, Array], name: str) -> str:
    try:
        return bytes(given[name][0, 0]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8; give text") from error


def _messages(text: str) -> Sequence[Mapping[str, Any]]:
    try:
        found = parse_json(text)
    except Unreadable as error:
        raise InputError(f"MESSAGES is not JSON ({error}); give a list of messages") from error
    if not isinstance(found, list):
        raise InputError("MESSAGES holds no list; give a list of messages")
    return found


def _picture(data: bytes, number: int) -> Any:
    """The picture in the bytes of an image file or in a data URL, RGB, turned as its EXIF says."""
    wrong = f"IMAGE {number} is not a readable image; give the bytes of a PNG or JPEG file, or a base64 data URL"
    if data.startswith(b"data:"):
        # JSON has no bytes.
        try:
            data = base64.b64decode(data.partition(b",")[2], validate=True)
        except binascii.Error as error:
            raise InputError(wrong) from error
    return read_image(io.BytesIO(data), f"IMAGE {number}", wrong)


def texts(*values: bytes) -> Array:
    """[1, n], texts as Triton takes them."""
    return np.array([values], dtype=np.object_)
