"""From a request to its answer: prepares prompts, follows a job's events, and turns tokens into text."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from vtexport.errors import InputError
from vtexport.runtime.request import Request
from vtexport.runtime.runner import Runner
from vtexport.runtime.text import TextStream
from vtexport.serve.images import fetched
from vtexport.serve.protocol import ChatRequest, image_urls
from vtexport.serve.scheduler import End, Event, Failure, Job, Scheduler

#: seconds between two looks at whether the client is still there
_LOOK = 0.5


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        new_tokens: tokens of an answer, also of a request that says nothing.
        request_bytes: bytes of a request, and of an image file.
        pixels: pixels of an image.
        seconds: from a request's arrival to the end of its answer.
        hosts: hosts from which image URLs are fetched.
    """

    new_tokens: int
    request_bytes: int
    pixels: int
    seconds: float
    hosts: tuple[str, ...] = ()


class Refused(Exception):
    """A request that ends with an HTTP status and one line instead of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered: its prompt and images, and how many tokens at most."""

    request: Request
    prompt_tokens: int
    new_tokens: int


class Kitchen:
    """Prepares requests for one bundle.

    Raises:
        InputError: a bundle whose prompts cannot come over this API.
    """

    def __init__(self, runner: Runner, limits: Limits) -> None:
        runner.need_language_model()
        folder, spec = runner.bundle.folder, runner.spec
        if runner.given:
            raise InputError(
                f"{folder} prunes by another bundle's ranking, which a server cannot ask for; use vtexport run"
            )
        if spec.views.has_frames:
            raise InputError(f"{folder} answers about videos, which the API has no parts for; use vtexport run")
        self._runner, self._limits = runner, limits
        # Tokenizers of several threads would get in each other's way.
        self._lock = threading.Lock()

    def prepared(self, chat: ChatRequest) -> Prepared:
        """The request of `chat`.

        Raises:
            InputError: images or messages that the bundle cannot take, or too many tokens.
        """
        limits, runner = self._limits, self._runner
        new_tokens = limits.new_tokens if chat.limit is None else chat.limit
        if new_tokens > limits.new_tokens:
            raise InputError(f"max_tokens {new_tokens} is more than the server's {limits.new_tokens}; ask for fewer")
        urls = image_urls(chat.messages)
        if len(urls) != runner.prompter.images:
            raise InputError(
                f"the messages have {len(urls)} image_url parts, this model takes {runner.prompter.images} per conversation"
            )
        pictures = [fetched(url, limits.hosts, limits.request_bytes, limits.pixels) for url in urls]
        with self._lock:
            request = runner.request(pictures if len(pictures) > 1 else pictures[0], chat.messages)
        prompt_tokens = len(request.prompt.token_ids) + runner.plan.vision_tokens
        positions = runner.bundle.manifest.model.max_positions
        if prompt_tokens + new_tokens > positions:
            raise InputError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's {positions} positions; "
                "shorten the messages or give a smaller max_tokens"
            )
        runner.engine.admit(1, len(request.prompt.token_ids), new_tokens)
        return Prepared(request, prompt_tokens, new_tokens)


class Answering:
    """One answer on its way, as pieces of text.

    Args:
        runner: whose prompter turns tokens into text.
        scheduler: answers the job.
        prepared: the request.
        chat: how it is to be answered.
        seconds: until it is given up.
        gone: whether the client has left.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        prepared: Prepared,
        chat: ChatRequest,
        seconds: float,
        gone: Callable[[], Awaitable[bool]],
    ) -> None:
        self._stops, self._gone = chat.stops, gone
        self._text = TextStream(runner.prompter)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        ends = () if chat.ignore_eos else runner.bundle.manifest.model.eos_token_ids
        self._job = Job(prepared.request, prepared.new_tokens, ends, time.monotonic() + seconds, deliver)
        scheduler.submit(self._job)
        #: tokens so far
        self.tokens = 0
        #: why it ended
        self.reason = "stop"

    def cancel(self) -> None:
        """Free the job's slot: nobody wants the rest."""
        self._job.cancelled = True

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece; the first may be empty.

        Raises:
            Refused: it ends without an answer.
        """
        held = ""
        try:
            while True:
                event = await self._next()
                if isinstance(event, Failure):
                    raise Refused(event.status, event.message)
                if isinstance(event, End):
                    self.reason = event.reason
                    piece = self._text.rest()
                else:
                    self.tokens += 1
                    piece = self._text.add(event.token)
                held += piece
                found = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
                if found:
                    self.reason = "stop"
                    if held[: min(found)]:
                        yield held[: min(found)]
                    return
                # What may be the beginning of a stop text waits for the rest of it.
                kept = 0 if isinstance(event, End) else _begun(held, self._stops)
                ready, held = held[: len(held) - kept], held[len(held) - kept :]
                # The first token is told even if it is no text yet, so that clients know that their answer has begun.
                if ready or self.tokens == 1:
                    yield ready
                if isinstance(event, End):
                    return
        finally:
            self.cancel()

    async def _next(self) -> Event:
        """The next event, while the client is there.

        Raises:
            Refused: it has left.
        """
        while True:
            try:
                return await asyncio.wait_for(self._events.get(), _LOOK)
            except TimeoutError:
                if await self._gone():
                    raise Refused(499, "the client has left") from None


def _begun(text: str, stops: list[str]) -> int:
    """The length of the longest end of `text` with which one of `stops` begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
