"""The inputs and results of a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.models.conversation import Question
from vtexport.models.prompt import Prompt
from vtexport.models.views import Views


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: its prompt.
        views: its images.
        extras: the method's inputs besides them (`vtexport.pruning.extra`), by name, without the batch axis.
    """

    prompt: Prompt
    views: Views
    extras: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How far to decode, greedily.

    Attributes:
        max_new_tokens: at least 1.
        max_positions: the model's longest sequence.
        eos_token_ids: tokens that end a row; with none every row runs to `max_new_tokens`.
        keep_logits: whether results carry logits.
    """

    max_new_tokens: int
    max_positions: int
    eos_token_ids: Sequence[int] = ()
    keep_logits: bool = False


@dataclass
class Result:
    """One answer.

    Attributes:
        token_ids: the generated tokens, the end token included if it came.
        kept: by stage (`Stage.where`), the tokens that stay as they were, indices [K'] int32 into its input.
        debug: the further outputs of a debug build: by stage `score` and `cluster`, and `raters` over the text.
        logits: [len(token_ids), vocabulary] fp32 if asked for.
        ranking: [V] attention to each visual token over prompt and answer, if the build gives it.
        bucket: the number of the plan that this row got.
        spread: the spread of CLS attention by which that plan was chosen; None if there is only one plan.
    """

    token_ids: list[int] = field(default_factory=list)
    kept: dict[str, Array] = field(default_factory=dict)
    debug: dict[str, Array] = field(default_factory=dict)
    logits: Array | None = None
    ranking: Array | None = None
    bucket: int = 0
    spread: float | None = None


@dataclass(frozen=True)
class Timings:
    """Milliseconds of a batch, and the bytes of its KV cache when it was largest."""

    vision: float
    prefill: float
    decode: tuple[float, ...]
    cache_bytes: int

    @property
    def per_token(self) -> float | None:
        """Median time of a decode step; None if there was none."""
        return float(np.median(self.decode)) if self.decode else None


@dataclass(frozen=True)
class Embedded:
    """A prompt after the vision stage: its text with a mark per image, its question, the images' tokens [K, C].

    `mark` is what stands for an image in the text, and maybe in the question, which may be a conversation.
    """

    text: str
    question: Question
    images: list[Array]
    mark: str


def check_pairs(pairs: Any) -> None:
    """Refuse what is no list of images and questions.

    Raises:
        InputError: it is empty, or an element is no pair.
    """
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Sequence) or not pairs:
        raise InputError("no pairs of an image and a question were given; give a list such as [(image, question)]")
    for number, pair in enumerate(pairs, start=1):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(
                f"element {number} is no pair of an image and a question; give a list such as [(image, question)]"
            )


def check_new_tokens(count: Any) -> int:
    """The number of tokens that an answer may have at most.

    Raises:
        InputError: it is no whole number of 1 or more.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise InputError(f"max_new_tokens is {count!r}; give a whole number of 1 or more")
    return int(count)
