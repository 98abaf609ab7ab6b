"""Prompts and images as the checkpoint's own processor sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError, ModelError, first_line

IMAGE_MARK = "<image>"
# What a processor is made of; copied into every bundle when present.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: the text tokens, and before which of them the image stands."""

    token_ids: tuple[int, ...]
    image_position: int

    @property
    def num_after(self) -> int:
        """Text tokens after the image."""
        return len(self.token_ids) - self.image_position


class Prompter:
    """Turns questions into prompts and images into pixels with the checkpoint's own processor files."""

    def __init__(self, folder: Path, image_token_id: int, image_size: int) -> None:
        from transformers import AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a missing or broken file
            first = first_line(error)
            raise ModelError(
                f"{folder} has no usable processor ({first}); get tokenizer and processor files"
            ) from error
        if getattr(self._processor, "image_processor", None) is None:
            raise ModelError(f"{folder} has no image processor; get preprocessor_config.json of the checkpoint")
        self.tokenizer: Any = self._processor.tokenizer
        self._image_token_id = image_token_id
        self._image_size = image_size

    def prompt(self, question: str) -> Prompt:
        """The chat prompt that asks `question` about one image.

        The image stands where the chat template puts it, or at `<image>` if `question` says it.

        Raises:
            InputError: more than one `<image>`, an empty question, or no chat template.
        """
        marks = question.count(IMAGE_MARK)
        if marks > 1:
            raise InputError(f"the prompt has {marks} {IMAGE_MARK} marks; give exactly one image a prompt")
        if not question.replace(IMAGE_MARK, "").strip():
            raise InputError("the prompt is empty; ask something about the image")
        parts = question if marks else [{"type": "image"}, {"type": "text", "text": question}]
        if not getattr(self._processor, "chat_template", None):
            raise InputError("the checkpoint has no chat template; add chat_template.jinja to its folder")
        messages = [{"role": "user", "content": parts}]
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token_ids = list(self.tokenizer(text)["input_ids"])
        places = [i for i, token in enumerate(token_ids) if token == self._image_token_id]
        if len(places) != 1:
            raise InputError(
                f"the chat template turned the prompt into one with {len(places)} images; exactly one is supported"
            )
        del token_ids[places[0]]
        return Prompt(tuple(token_ids), places[0])

    def pixels(self, image: Any) -> np.ndarray[Any, Any]:
        """`image`, a PIL image, as float32 [3, S, S].

        Raises:
            ModelError: the processor yields another size than the vision tower takes.
        """
        values = self._processor.image_processor(images=image, return_tensors="np")["pixel_values"]
        array = np.asarray(values[0], dtype=np.float32)
        if array.shape[1:] != (self._image_size, self._image_size):
            raise ModelError(
                f"the image processor yields {array.shape[1]} x {array.shape[2]} pixels but the vision tower takes "
                f"{self._image_size} x {self._image_size}; check preprocessor_config.json"
            )
        return array

    def shown(self, image: Any) -> Any:
        """`image` as the tower sees it, a PIL image: the pixels with normalisation undone."""
        from PIL import Image

        processor = self._processor.image_processor
        mean = np.asarray(processor.image_mean, dtype=np.float32)[:, None, None]
        std = np.asarray(processor.image_std, dtype=np.float32)[:, None, None]
        plain = self.pixels(image) * std + mean if processor.do_normalize else self.pixels(image)
        return Image.fromarray(np.clip(plain.transpose(1, 2, 0) * 255 + 0.5, 0, 255).astype(np.uint8))

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, special tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def open_image(path: Path) -> Any:
    """The image in file `path`, as an RGB PIL image, turned as its EXIF says.

    Raises:
        InputError: no such file, or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{path}: no such image; check the path given with --image")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image; give a PNG or JPEG file") from error
