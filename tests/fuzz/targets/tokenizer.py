"""The files of tokenizer and image processor: tokenizer.json and its settings, processor_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from tests.checkpoints import MICRO
from vtexport.models import Prompter, read_spec

_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
#: by what a damaged file is known; any other is tokenizer_config.json
_MARKS = (
    (b"image_p", _FILES[0]),
    (b"vocab", _FILES[2]),
    (b"added_t", _FILES[2]),
    (b"lstrip", "special_tokens_map.json"),
)


def seeds(place: Path) -> list[bytes]:
    """Each file of micro-llava; of the tokenizer, one with a few words."""
    small = json.loads((MICRO / "tokenizer.json").read_text())
    small["model"]["merges"] = small["model"]["merges"][:8]
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"bos_token": token, "unk_token": "<unk>", "additional_special_tokens": [{**token, "content": "<image>"}]}
    return [
        *((MICRO / name).read_bytes() for name in _FILES[:2]),
        *(json.dumps(one).encode() for one in (small, special)),
    ]


def one(data: bytes, place: Path) -> None:
    """Open micro-llava's processor with this file in the place of the one that it resembles."""
    name = next((file for mark, file in _MARKS if mark in data), _FILES[1])
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
        for other in {*names, name}:
            (place / other).unlink()
