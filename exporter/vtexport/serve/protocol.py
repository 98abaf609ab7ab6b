"""OpenAI's chat completions, as far as a greedy engine of one bundle can serve them.

What would change an answer and cannot be done here is refused, not ignored: sampling, several answers, log
probabilities, tools, other formats than text. What changes no answer (`user`, `seed`, `metadata`) is accepted.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vtexport.errors import InputError, cut
from vtexport.models.conversation import Messages

#: values that change nothing, by the names of parameters that are refused with any other
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request to `/v1/chat/completions`.

    `ignore_eos` is an extension that benchmarks use: the answer has all of its tokens, whether the model ends it or not.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    seed: int | None = Field(None, strict=True)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_works(cls, data: Any) -> Any:
        """Refuse parameters that cannot take effect, and leave out those that ask for what happens anyway."""
        if not isinstance(data, dict):
            return data
        for name, values in _NEUTRAL.items():
            value = data.get(name)
            if value is not None and value not in values:
                raise ValueError(
                    f"{name} {shown(value)} has no effect here, where decoding is greedy and gives one text; leave {name} out"
                )
        return {name: value for name, value in data.items() if name not in _NEUTRAL}

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(stops):
            raise ValueError("stop takes up to four texts, none of them empty")
        return stops

    @property
    def limit(self) -> int | None:
        """New tokens at most, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer, and are no part of it."""
        return list(self.stop or [])

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def read_request(body: bytes) -> ChatRequest:
    """The request in `body`.

    Raises:
        InputError: it is not JSON, or not such a request.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {said}" if where else said) from error
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InputError("max_tokens has no effect beside max_completion_tokens; give one of them")
    if request.stream_options is not None and not request.stream:
        raise InputError("stream_options has no effect without stream; set stream, or leave it out")
    return request


def image_urls(messages: Messages) -> list[str]:
    """The URLs of the images in `messages`, in their order.

    Raises:
        InputError: an `image_url` part without one, or with a `detail` that would change the image.
    """
    urls = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") != "image_url":
                continue
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise InputError('an image_url part has no URL; give {"type": "image_url", "image_url": {"url": …}}')
            detail = given.get("detail", "auto") if isinstance(given, dict) else "auto"
            if detail != "auto":
                raise InputError(
                    f"detail {shown(detail)} has no effect: the bundle's size of images is fixed; leave it out"
                )
            urls.append(url)
    return urls


def shown(value: object) -> str:
    """A value of a request for an error line."""
    return cut(repr(value))


class Replies:
    """The answers to one request, in OpenAI's forms.

    Args:
        model: the name that the server goes by.
        prompt_tokens: text and visual tokens that enter the decoder.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """An answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(tokens)}

    def piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of an answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last(self, tokens: int) -> dict[str, Any]:
        """What comes behind all pieces if usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        """The tokens of prompt and answer."""
        total = self._prompt_tokens + tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _head(self, kind: Literal["chat.completion", "chat.completion.chunk"]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
