"""Conversations: messages are checked and brought into the form that chat templates take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtexport.errors import InputError, first_line
from vtexport.models.bounds import shown
from vtexport.reading import TEXT_BYTES, Unreadable, parse_json, read_bytes

#: a question, or the messages of a conversation that ends with one
Question = str | Sequence[Mapping[str, Any]]
#: messages whose content is a list of parts, as `turns` makes them
Messages = list[dict[str, Any]]

#: messages and their parts together, and characters of their texts, at most; no model has positions for as many
MOST_PARTS, MOST_TEXT = 4096, 1 << 20

_EXAMPLE = '[{"role": "user", "content": "what is it?"}]'
_REMEDY = f"give a list of messages such as {_EXAMPLE}"


def turns(question: Question, mark: str, part: str, images: int) -> Messages:
    """The messages that `question` consists of, images in place; a single question is a conversation of one turn.

    Args:
        question: a question, or messages with `role` and `content`; other keys are not read. Roles are user and assistant
            in turns, user first and last, after a system message or none. Content is text, or a list of parts:
            `{"type": "text", "text": …}`, and `{"type": "image"}` or `{"type": "image_url", …}` where an image stands.
        mark: what stands for an image in a text.
        part: the type of a part that stands for an image.
        images: how many images the prompt has. If none is marked, they stand in front of the first user turn.

    Returns:
        messages whose content is a list of parts, of type text or `part`.

    Raises:
        InputError: messages that are none, are empty or in a wrong order, or a wrong number of images.
    """
    single = isinstance(question, str)
    messages: Messages = []
    marked = count = length = 0
    for number, message in enumerate(_listed(question), start=1):
        name = "the prompt" if single else f"message {number}"
        role, parts = _role(message, name), _parts(message, part, name)
        count, length = count + len(parts), length + sum(len(one.get("text", "")) for one in parts)
        if count > MOST_PARTS or length > MOST_TEXT:
            raise InputError(
                f"the conversation has more than {MOST_PARTS} parts or {MOST_TEXT} characters; give a shorter one"
            )
        found = sum(one["text"].count(mark) if one["type"] == "text" else 1 for one in parts)
        if found and role != "user":
            raise InputError(f"{name} is of role {role} but has {part} parts or marks; move them to one of the user")
        check_whole(_text(parts), name)
        if not _text(parts).replace(mark, "").strip():
            remedy = "ask something about the image" if single else "give its text, or leave it out"
            raise InputError(f"{name} is empty; {remedy}")
        messages.append({"role": role, "content": parts})
        marked += found
    _check_order([message["role"] for message in messages])
    if marked not in (0, images):
        said = (
            f"the prompt has {marked} {mark} marks" if single else f"the messages have {marked} {part} parts or marks"
        )
        raise InputError(
            f"{said}, this model was built for {images} per prompt; give as many, or none, or build with another --images"
        )
    if not marked:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": part}] * images + first["content"]
    return messages


def asked(question: Question) -> str:
    """The text of the last turn of a conversation that `turns` takes."""
    if isinstance(question, str):
        return question
    content = question[-1]["content"]
    return content if isinstance(content, str) else _text(content)


def rendered(messages: Messages, template: Callable[[Messages], str]) -> str:
    """The text that a chat template makes of `messages`.

    Args:
        messages: what `turns` gave.
        template: the template as a function.

    Raises:
        InputError: the template refuses the messages, or leaves one out.
    """
    from jinja2 import TemplateError

    forms = [messages]
    if all(part["type"] == "text" for message in messages for part in message["content"]):
        # Some templates take texts instead of parts; theirs is then the only way to mark an image.
        forms.insert(0, [{**message, "content": _text(message["content"])} for message in messages])
    trouble = ""
    for form in forms:
        try:
            text = template(form)
        except TemplateError as error:
            trouble = f"the chat template refuses the prompt ({first_line(error)}); give messages that it takes"
            continue
        except TypeError as error:
            trouble = f"the chat template takes texts alone ({first_line(error)}); mark images in the text"
            continue
        # Templates iterate over parts without complaint where there is text, and find none. Some know no system message.
        lost = [number for number, message in enumerate(messages, start=1) if not _all_in(message["content"], text)]
        if not lost:
            return text
        role = messages[lost[0] - 1]["role"]
        trouble = f"the chat template leaves out message {lost[0]}, of role {role}; put its text into a user's message"
    raise InputError(trouble)


def read_messages(path: Path) -> list[Any]:
    """The messages in JSON file `path`, or on stdin if it is `-`; `turns` checks them.

    Raises:
        InputError: no such file, or no JSON list.
    """
    stdin = str(path) == "-"
    name = "stdin" if stdin else path
    try:
        # The user's own path, which may be a pipe.
        data = _stdin() if stdin else read_bytes(path, regular=False)
    except Unreadable as error:
        raise InputError(f"{name}: {error}; check the path given with --messages") from error
    try:
        found = parse_json(data)
    except Unreadable as error:
        raise InputError(f"{name} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(found, list):
        raise InputError(f"{name} holds no list of messages; {_REMEDY}")
    return found


def _stdin() -> bytes:
    data = sys.stdin.buffer.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise Unreadable(f"larger than {TEXT_BYTES} bytes")
    return data


def check_whole(text: str, name: str) -> None:
    """Refuse text that is not Unicode, as JSON and file names can hold it: halves of characters (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} has half of a character in it (a lone surrogate); give whole characters") from error


def _listed(question: Any) -> Sequence[Any]:
    """The messages of `question`, which may be anything yet."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    if not isinstance(question, Sequence) or isinstance(question, bytes):
        raise InputError(f"a conversation is a list of messages, not {type(question).__name__}; {_REMEDY}")
    if not question:
        raise InputError(f"the conversation has no messages; {_REMEDY}")
    if len(question) > MOST_PARTS:
        raise InputError(f"the conversation has {len(question)} messages, and {MOST_PARTS} can be taken; give fewer")
    return question


def _role(message: Any, name: str) -> str:
    if not isinstance(message, Mapping):
        raise InputError(f"{name} is of type {type(message).__name__}, not an object with role and content; {_REMEDY}")
    if message.get("role") not in ("system", "user", "assistant"):
        raise InputError(f"{name} has role {shown(message.get('role'))}; give system, user or assistant")
    return str(message["role"])


def _parts(message: Mapping[str, Any], part: str, name: str) -> list[dict[str, Any]]:
    """The content of a message as parts of type text or `part`."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"{name} has content of type {type(content).__name__}; give text or a list of parts")
    parts = []
    for number, one in enumerate(content, start=1):
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind == "text" and isinstance(one.get("text"), str):
            parts.append({"type": "text", "text": one["text"]})
        elif kind in (part, f"{part}_url"):
            parts.append({"type": part})
        else:
            wrong = 'of type text has no "text"' if kind == "text" else f"has type {shown(kind)}"
            raise InputError(
                f'part {number} of {name} {wrong}; give {{"type": "text", "text": …}}, or {{"type": "{part}"}} where the '
                f"{part} stands"
            )
    return parts


def _check_order(roles: Sequence[str]) -> None:
    """Refuse roles that are not a system message or none, and then user and assistant in turns up to the user."""
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:]):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            raise InputError(
                f"message {first + number + 1} has role {role} where {expected} is due; give user and assistant in turns, "
                "after one system message at most"
            )
    if roles[-1] != "user":
        raise InputError(f"the last message has role {roles[-1]}; end with a question of the user")


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _all_in(parts: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether `text` has all texts of a message's content; templates may strip them."""
    return all(part["text"].strip() in text for part in parts if part["type"] == "text")
