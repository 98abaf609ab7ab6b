"""Requests to the chat completions of TensorRT-LLM's server, whole and streamed; the standard library alone."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT = 300.0


class ServerError(Exception):
    """What a server said in place of an answer."""


@dataclass(frozen=True)
class Reply:
    """An answer, and the tokens of its prompt, every visual token among them."""

    text: str
    prompt_tokens: int


@dataclass(frozen=True)
class Timed:
    """Milliseconds from the request to the first token, and from one token to the next."""

    first_token: float
    per_token: float


def image_part(image: Any) -> dict[str, Any]:
    """The part of a message that shows a PIL image, which goes along as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def ask(url: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
    """The greedy answer to `messages`.

    Raises:
        ServerError: the server refused, or did not answer.
    """
    with _posted(url, {"messages": messages, "max_tokens": max_tokens}) as response:
        answer = json.load(response)
    return Reply(str(answer["choices"][0]["message"]["content"]).strip(), int(answer["usage"]["prompt_tokens"]))


def ask_streaming(url: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Timed:
    """Times of an answer of exactly `max_tokens` tokens. The server sends its first event with the first token.

    Raises:
        ServerError: the server refused, or did not answer.
    """
    body = {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    start, times, tokens = time.perf_counter(), [], 0
    with _posted(url, {**body, "stream_options": {"include_usage": True}}) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if event.get("choices"):
                times.append(time.perf_counter())
            if event.get("usage"):
                tokens = int(event["usage"]["completion_tokens"])
    if not times or tokens < 2:
        raise ServerError(f"a streamed answer had {len(times)} events and {tokens} tokens")
    return Timed(1000 * (times[0] - start), 1000 * (times[-1] - times[0]) / (tokens - 1))


def healthy(url: str) -> bool:
    """Whether a server is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _posted(url: str, body: Mapping[str, Any]) -> Any:
    data = json.dumps({"model": "llava", "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        told = " ".join(error.read().decode(errors="replace").split())
        raise ServerError(f"the server answered {error.code}: {told[:500]}") from error
    except OSError as error:
        raise ServerError(f"the server did not answer ({error})") from error
