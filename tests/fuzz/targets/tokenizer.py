"""The files of tokenizer and image processor: tokenizer.json, tokenizer_config.json, processor_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from tests.checkpoints import MICRO
from vtexport.models import Prompter, read_spec

_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


def seeds(place: Path) -> list[bytes]:
    """Each file of micro-llava; of the tokenizer, one with a few words."""
    small = json.loads((MICRO / "tokenizer.json").read_text())
    small["model"]["merges"] = small["model"]["merges"][:8]
    return [*((MICRO / name).read_bytes() for name in _FILES[:2]), json.dumps(small).encode()]


def one(data: bytes, place: Path) -> None:
    """Open micro-llava's processor with this file in the place of the one that it resembles."""
    name = _FILES[0] if b"image_p" in data else _FILES[2] if b"vocab" in data or b"added_t" in data else _FILES[1]
    names = ("config.json", "chat_template.jinja", *_FILES)
    for other in names:
        shutil.copyfile(MICRO / other, place / other)
    (place / name).write_bytes(data)
    try:
        spec = read_spec(place)
        prompter = Prompter(place, spec)
        ids = prompter.prompt("what digit is red?").token_ids
        assert all(0 <= token < spec.decoder.vocab_size for token in ids)
        prompter.views(Image.new("RGB", (96, 96)))
    finally:
        for other in names:
            (place / other).unlink()
