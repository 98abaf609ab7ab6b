"""Files of a conversation's messages."""

from __future__ import annotations

from pathlib import Path

from vtexport.models.conversation import asked, read_messages, turns


def seeds(place: Path) -> list[bytes]:
    return [
        b'[{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "image"}, {"type": "text", '
        b'"text": "what?"}]}, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "where?"}]'
    ]


def one(data: bytes, place: Path) -> None:
    path = place / "messages.json"
    path.write_bytes(data)
    try:
        messages = read_messages(path)
        turns(messages, "<image>", "image", 1)
        asked(messages)
    finally:
        path.unlink()
