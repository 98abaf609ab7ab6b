"""Prompts for TensorRT-LLM's PyTorch backend, with the visual tokens of images that were pruned already."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Protocol

from vtexport.arrays import Array
from vtexport.errors import InputError, VerificationError
from vtexport.models.conversation import Question

if TYPE_CHECKING:
    from vtexport.models.prompt import Prompter
    from vtexport.pruning import PruningPlan


class Embedded(Protocol):
    """A prompt: its text with a mark for each image, its question, each image's tokens [K, C], and what a mark is.

    The question may be a conversation.
    """

    @property
    def text(self) -> str: ...

    @property
    def question(self) -> Question: ...

    @property
    def images(self) -> Sequence[Array]: ...

    @property
    def mark(self) -> str: ...


class Embedder(Protocol):
    """Turns images and questions into embeddings: `vtexport.runtime.runner.Runner`."""

    plans: list[PruningPlan]
    prompter: Prompter

    def embed(self, pairs: Sequence[tuple[Any, Question]]) -> Sequence[Embedded]: ...


def prompts(runner: Embedder, pairs: Sequence[tuple[Any, Question]], dtype: Any = None) -> list[dict[str, Any]]:
    """Inputs for `tensorrt_llm.LLM.generate`.

    Args:
        runner: an opened bundle without pruning inside the decoder, or one of `--flow select`.
        pairs: images (see `vtexport.models.prompt.Prompter.views`), and questions or conversations.
        dtype: a torch dtype, that of the language model; None for the engine's.

    Returns:
        For each pair `{"prompt": text, "multi_modal_embeddings": {"image": [tensor [K, C], …]}}`: TensorRT-LLM expands each
        image mark to as many tokens as its tensor has rows.

    Raises:
        InputError: the bundle prunes inside the decoder, or a pair that `Runner.ask` would refuse.
    """
    return [
        {"prompt": prompt.text, "multi_modal_embeddings": {"image": _tensors(prompt, dtype)}}
        for prompt in runner.embed(pairs)
    ]


def messages(runner: Embedder, pairs: Sequence[tuple[Any, Question]], dtype: Any = None) -> list[list[dict[str, Any]]]:
    """Messages for `trtllm-serve`'s chat completions; arguments and errors as for `prompts`.

    Returns:
        For each pair the messages of a conversation: in the turn where images stand, one part of type `image_embeds` per
        image, with its tensor as `torch.save` writes it, in base64, and then the text; other turns are text.

    Raises:
        InputError: as for `prompts`, or an image behind text of its turn: the server puts images first.
    """
    conversations = []
    for prompt in runner.embed(pairs):
        tensors = iter(_tensors(prompt, dtype))
        turns = runner.prompter.turns(prompt.question)
        conversations.append([_message(turn, prompt.mark, tensors) for turn in turns])
    return conversations


def _message(turn: Mapping[str, Any], mark: str, tensors: Iterator[Any]) -> dict[str, Any]:
    """One message for the server: `turn` with the next of `tensors` in place of its images."""
    parts = turn["content"]
    ahead = list(takewhile(lambda part: part["type"] != "text", parts))
    text = "".join(part["text"] if part["type"] == "text" else mark for part in parts[len(ahead) :])
    embeds = [
        {"type": "image_embeds", "image_embeds": {"data": _encoded(tensor)}}
        for tensor in islice(tensors, len(ahead) + text.count(mark))
    ]
    text = _without_marks(text, mark)
    return {"role": turn["role"], "content": [*embeds, {"type": "text", "text": text}] if embeds else text}


def reached(runner: Embedder, question: Question, prompt_tokens: int) -> int:
    """How many visual tokens reached TensorRT-LLM's decoder, by the prompt tokens that it counted.

    Args:
        runner: the bundle that `prompts` or `messages` came from.
        question: the question that was asked, or the conversation.
        prompt_tokens: `usage.prompt_tokens` of a response of `trtllm-serve`, or `len(output.prompt_token_ids)` of the
            LLM API. Both count every visual token.

    Raises:
        VerificationError: another number than any of the bundle's plans has, such as that of the image unpruned.
    """
    tokens = prompt_tokens - len(runner.prompter.prompt(question).token_ids)
    planned = sorted({_sent(plan) for plan in runner.plans})
    exact = runner.plans[0].newlines == 0
    if tokens <= 0 or tokens > planned[-1] or (exact and tokens not in planned):
        raise VerificationError(
            f"{tokens} visual tokens reached the decoder, the bundle's plan has {' or '.join(map(str, planned))}; give it "
            "the prompts or messages of this bundle, with the special tokens that its tokenizer adds"
        )
    return tokens


def _sent(plan: PruningPlan) -> int:
    """Visual tokens of a prompt that a bundle of `plan` makes; a bundle that prunes in the decoder only chooses."""
    from vtexport.pruning.selection import selecting_stage

    return selecting_stage(plan).kept if plan.decoder_stages else plan.vision_tokens


def _without_marks(text: str, mark: str) -> str:
    """`text` without the image marks that it begins with; the server adds marks of its own for the images' parts."""
    if mark not in text:
        return text
    text = text.lstrip()
    while text.startswith(mark):
        text = text.removeprefix(mark).lstrip()
    if mark in text:
        raise InputError(
            f"the server puts images before the text, and the prompt has a {mark} mark behind text; put the marks first, "
            "or leave them out"
        )
    return text


def _tensors(prompt: Embedded, dtype: Any) -> list[Any]:
    import torch

    return [torch.from_numpy(image).to(dtype or torch.from_numpy(image).dtype) for image in prompt.images]


def _encoded(tensor: Any) -> str:
    import torch

    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
