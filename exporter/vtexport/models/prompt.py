"""Makes prompts and pixels as the checkpoint's own processor does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError, ModelError
from vtexport.models.bounds import check_processor
from vtexport.models.conversation import Messages, Question, rendered, turns
from vtexport.models.families import FAMILIES
from vtexport.models.pictures import SQUARE, as_picture, open_image, open_video, within
from vtexport.models.spec import ModelSpec
from vtexport.models.template import ChatTemplate
from vtexport.models.trust import open_image_processor, open_tokenizer, token_ids
from vtexport.models.views import Views
from vtexport.reading import Unreadable, read_json

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
    """A tokenized prompt: text tokens, the number of them before each image, and the text with its image marks."""

    token_ids: tuple[int, ...]
    image_positions: tuple[int, ...]
    text: str = ""

    @property
    def num_after(self) -> int:
        """Text tokens after the last image."""
        return len(self.token_ids) - self.image_positions[-1]


class Prompter:
    """Turns questions into prompts and images into views of the tower, with the checkpoint's own processor files.

    Args:
        folder: where these files lie.
        spec: the model.

    Raises:
        ModelError: a file is missing or broken.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        # AutoProcessor, which covers all modalities, would need torchvision for videos.
        self.tokenizer: Any = open_tokenizer(folder)
        self._images: Any = open_image_processor(folder)
        self._spec, self._family = spec, FAMILIES[spec.family]
        resolutions = self._family.resolutions(spec)
        settings = self._images.to_dict()
        check_processor(folder, settings, spec.vision.image_size, resolutions)
        # Whether it may pad images to squares before it scales them.
        self._squares = bool(settings.get("do_pad") or resolutions)
        template = chat_template(folder, self.tokenizer)
        self._template = ChatTemplate(template) if template else None

    @property
    def image_processor(self) -> Any:
        """The checkpoint's own image processor."""
        return self._images

    @property
    def images(self) -> int:
        """Images, or videos, per prompt."""
        return self._spec.views.images

    @property
    def mark(self) -> str:
        """What stands for an image, or for a video, in a prompt's text."""
        return self._family.mark

    def turns(self, question: Question) -> Messages:
        """The messages of a question or a conversation, images in place; see `vtexport.models.conversation.turns`."""
        return turns(question, self._family.mark, self._family.part, self.images)

    def prompt(self, question: Question) -> Prompt:
        """The chat prompt of `question`, or of a conversation, about its images.

        They stand where the chat template puts those of the first user turn, or where they are marked (`<image>`).

        Raises:
            InputError: a wrong number of marks, an empty question, messages that are no conversation, or no chat template
                for them.
            ModelError: the tokenizer fails, or gives tokens that the model does not have.
        """
        messages, count = self.turns(question), self.images
        text = rendered(messages, self._apply)
        ids = self._ids(text)
        places = [i for i, token in enumerate(ids) if token == self._spec.image_token_id]
        if len(places) != count:
            raise InputError(
                f"the chat template turned the prompt into one with {len(places)} images; {count} were asked for"
            )
        tokens = tuple(token for token in ids if token != self._spec.image_token_id)
        return Prompt(tokens, tuple(place - number for number, place in enumerate(places)), text)

    def _apply(self, messages: Messages) -> str:
        """The text that the chat template makes of `messages`, up to the answer, as transformers renders it."""
        if self._template is None:
            raise InputError("the checkpoint has no chat template; add chat_template.jinja to its folder")
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._template.render(**{**self.tokenizer.special_tokens_map, **given})

    def _ids(self, text: str) -> list[int]:
        """The tokens of `text`, each of which the model has."""
        ids = token_ids(self.tokenizer, text)
        strange = next((token for token in ids if not 0 <= token < self._spec.decoder.vocab_size), None)
        if strange is not None:
            raise ModelError(
                f"the tokenizer gives token {strange}, and the model has {self._spec.decoder.vocab_size}; "
                "the two do not belong together, get the tokenizer's files again"
            )
        return ids

    def views(self, pictures: Any) -> Views:
        """The pictures of a prompt as the vision graph takes them.

        Args:
            pictures: a PIL image, or a sequence of one per image of the prompt; a video is the sequence of its frames.

        Raises:
            InputError: a wrong number of pictures, or one that is none (`vtexport.models.pictures.as_picture`) or that
                this model's views cannot hold.
            ModelError: the processor yields another size than the vision tower takes.
        """
        several = [self._checked(picture) for picture in self.listed(pictures)]
        views, size = self._family.look(self._images, self._spec, several), self._spec.vision.image_size
        if views.pixels.shape[2:] != (size, size):
            raise ModelError(
                f"the image processor yields {views.pixels.shape[2]} x {views.pixels.shape[3]} pixels but the vision "
                f"tower takes {size} x {size}; check preprocessor_config.json"
            )
        return views

    def _checked(self, picture: Any) -> Any:
        """The picture of one image of the prompt, or the frames of one video, as the processor takes them."""
        if self._spec.views.has_frames and isinstance(picture, Sequence) and not isinstance(picture, str | bytes):
            return [self._taken(frame) for frame in picture]
        return self._taken(picture)

    def _taken(self, picture: Any) -> Any:
        taken = as_picture(picture)
        return within(taken, SQUARE) if self._squares else taken

    def grouped(self, pictures: Sequence[Any]) -> Any:
        """PIL images, one per picture or per frame, grouped as `views` takes them."""
        if not self._spec.views.has_frames:
            return list(pictures)
        each = self._spec.views.views
        videos = [list(pictures[start : start + each]) for start in range(0, len(pictures), each)]
        return videos[0] if self.images == 1 else videos

    def listed(self, pictures: Any) -> list[Any]:
        """`pictures` as a list, one per image of the prompt; see `views`.

        Raises:
            InputError: a wrong number of them.
        """
        # A single video is a sequence itself, of its frames.
        single_video = self.images == 1 and self._spec.views.has_frames
        one = single_video or isinstance(pictures, str | bytes) or not isinstance(pictures, Sequence)
        several = [pictures] if one else list(pictures)
        if len(several) != self.images:
            raise InputError(f"{len(several)} images were given, this model was built for {self.images} per prompt")
        return several

    def open_pictures(self, paths: Sequence[Path]) -> Any:
        """The pictures of one prompt from files, as `views` takes them: an image each, or a video each.

        Raises:
            InputError: a file that is not an image or a video, or a wrong number of files.
        """
        if len(paths) != self.images:
            raise InputError(f"{len(paths)} --image given, this bundle was built for {self.images} per prompt")
        if self._spec.views.has_frames:
            opened: list[Any] = [open_video(path, self._spec.views.views) for path in paths]
        else:
            opened = [open_image(path) for path in paths]
        return opened[0] if self.images == 1 else opened

    def pairs(self, paths: Sequence[Path], questions: Sequence[str]) -> list[tuple[Any, str]]:
        """Pictures and questions in pairs; every question takes as many files as a prompt has images.

        Raises:
            InputError: as `open_pictures`.
        """
        if len(paths) != self.images * len(questions):
            many = "one image" if self.images == 1 else f"{self.images} images"
            raise InputError(
                f"{len(paths)} --image and {len(questions)} --prompt given; give {many} for every prompt, in "
                "their order"
            )
        starts = range(0, len(paths), self.images)
        return [
            (self.open_pictures(paths[start : start + self.images]), question)
            for start, question in zip(starts, questions, strict=True)
        ]

    def shown(self, pixels: np.ndarray[Any, Any]) -> Any:
        """Pixels [3, S, S] of a view as a PIL image: normalisation undone."""
        from PIL import Image

        processor = self._images
        mean = np.asarray(processor.image_mean, dtype=np.float32)[:, None, None]
        std = np.asarray(processor.image_std, dtype=np.float32)[:, None, None]
        plain = pixels * std + mean if processor.do_normalize else pixels
        return Image.fromarray(np.clip(plain.transpose(1, 2, 0) * 255 + 0.5, 0, 255).astype(np.uint8))

    def pieces(self, prompt: Prompt) -> list[str]:
        """The text that each token of `prompt` stands for, with what precedes it since the token before.

        Of several tokens for one character, the first has it.
        """
        if not self.tokenizer.is_fast:
            # Only tokenizers in Rust know places; by itself, a token of the others may lose the space before it.
            return [str(self.tokenizer.decode([token])) for token in prompt.token_ids]
        found = self.tokenizer(prompt.text, return_offsets_mapping=True)
        pieces, upto = [], 0
        for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            piece, upto = prompt.text[upto : max(upto, end)], max(upto, end)
            if token != self._spec.image_token_id:
                pieces.append(piece)
        return pieces

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, special tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def chat_template(folder: Path, tokenizer: Any = None) -> str:
    """The tokenizer's chat template, or the processor's, which older checkpoints keep in a file of its own; "" if none.

    Args:
        folder: where the files lie.
        tokenizer: the tokenizer, if it is open already.

    Raises:
        ModelError: a file is broken.
    """
    if tokenizer is None:
        tokenizer = open_tokenizer(folder)
    found, legacy, place = tokenizer.chat_template, folder / "chat_template.json", folder
    if not found and legacy.exists():
        try:
            found, place = read_json(legacy, kind=dict[str, Any]).get("chat_template"), legacy
        except Unreadable as error:
            raise ModelError(f"{legacy} is not a chat template ({error}); get it again") from error
    if isinstance(found, dict):
        # Of several, transformers takes this one too where no tools are called.
        found = found.get("default")
    if not isinstance(found, str | None):
        raise ModelError(f"{place} has a chat template of type {type(found).__name__}, not text; get it again")
    return found or ""
