"""Chat messages to what a server is asked, and back, in the way of TensorRT-LLM's OpenAI server."""

from __future__ import annotations

import base64
import io
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

#: what a request may say, of what TensorRT-LLM knows; it refuses any other, `max_completion_tokens` too
FIELDS = {
    *("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop"),
    *("stream", "stream_options", "ignore_eos", "min_tokens", "truncate_prompt_tokens"),
}


class BadRequestError(ValueError):
    """What a client is told with status 400."""


def check_fields(body: Mapping[str, Any]) -> None:
    """Refuse a request with a field that is unknown, or without one that must be there."""
    unknown = sorted(set(body) - FIELDS)
    if unknown:
        raise BadRequestError(f"{unknown[0]}: Extra inputs are not permitted")
    for name in ("model", "messages"):
        if name not in body:
            raise BadRequestError(f"{name}: Field required")


def conversation(messages: Sequence[Mapping[str, Any]], embeds: bool) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Messages with a string each, which begins with the marks of its images, and the images.

    Args:
        messages: as the client sent them.
        embeds: whether parts of type `image_embeds` are known, which 1.2.0 has not yet.
    """
    shown: dict[str, list[Any]] = {"multi_modal_data": [], "multi_modal_embeddings": []}
    read = []
    for message in messages:
        content, texts, marks = message["content"], [], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image_url":
                shown["multi_modal_data"].append(_image(part["image_url"]["url"]))
                marks.append("<image>")
            elif part["type"] == "image_embeds" and embeds:
                shown["multi_modal_embeddings"].append(_tensor(part["image_embeds"]["data"]))
                marks.append("<image>")
            else:
                raise BadRequestError(f"Unknown part type: {part['type']}")
        read.append({"role": message["role"], "content": "\n".join([*marks, "\n".join(texts)])})
    return read, {name: {"image": images} for name, images in shown.items() if images}


def _image(url: str) -> Image.Image:
    if not url.startswith("data:image/"):
        raise BadRequestError(f"the stand-in takes data URIs alone, not {url[:40]}")
    with urllib.request.urlopen(url) as opened:
        return Image.open(io.BytesIO(opened.read())).convert("RGB")


def _tensor(data: str) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(data)), weights_only=True)


def completion(body: Mapping[str, Any], text: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": text, "tool_calls": []}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }


def chunk(body: Mapping[str, Any], delta: Mapping[str, Any] | None, usage: Mapping[str, int] | None) -> dict[str, Any]:
    """A piece of it; the last one has usage and no choice."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    made = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": body["model"], "choices": choices}
    return made if usage is None else {**made, "usage": usage}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """Tokens of the prompt, every visual token among them, and of the answer."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
