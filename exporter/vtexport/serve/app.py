"""The server's HTTP interface."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vtexport.errors import VtexportError
from vtexport.runtime.runner import Runner
from vtexport.serve.answers import Answering, Kitchen, Limits, Refused
from vtexport.serve.metrics import Metrics
from vtexport.serve.protocol import ChatRequest, Replies, error_body, read_request, shown
from vtexport.serve.scheduler import QueueFull, Scheduler

#: threads that open and scale images
_COOKS = 4


@dataclass
class Server:
    """What the routes work with.

    Attributes:
        runner: the opened bundle.
        name: the name of its model in requests.
        limits: what a request may ask for.
        slots: requests that decode together.
        queue: requests that wait beyond these.
    """

    runner: Runner
    name: str
    limits: Limits
    slots: int
    queue: int
    metrics: Metrics = field(default_factory=Metrics)
    since: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.kitchen = Kitchen(self.runner, self.limits)
        self.scheduler = Scheduler(self.runner, self.slots, self.queue, self.metrics)
        self.cooks = ThreadPoolExecutor(_COOKS, "vtexport-prepare")

    async def body(self, request: Request) -> bytes:
        """The request's body.

        Raises:
            Refused: it is larger than the limit.
        """
        most, parts, size = self.limits.request_bytes, [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"the request has more than the server's {most} bytes; send smaller images")
            parts.append(part)
        return b"".join(parts)

    async def chat(self, request: Request) -> Response:
        """Answer a request to `/v1/chat/completions`."""
        chat = read_request(await self.body(request))
        if chat.model != self.name:
            raise Refused(404, f"there is no model {shown(chat.model)} here; ask for {self.name!r}")
        try:
            self.scheduler.reserve()
        except QueueFull:
            self.metrics.outcomes.labels("rejected").inc()
            raise Refused(429, "the server has no place for another request; ask again later") from None
        handed = False
        try:
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self.cooks, self.kitchen.prepared, chat)
            self.metrics.prompt_tokens.inc(prepared.prompt_tokens)
            seconds, gone = self.limits.seconds, request.is_disconnected
            answering = Answering(self.runner, self.scheduler, prepared, chat, seconds, gone)
            replies = Replies(self.name, prepared.prompt_tokens)
            if not chat.stream:
                text = "".join([piece async for piece in answering.pieces()])
                return JSONResponse(replies.whole(text, answering.reason, answering.tokens))
            pieces = answering.pieces()
            # Until the first piece, a failure can still be told by the status.
            first = await anext(pieces, "")
            handed = True
            return _Stream(self._streamed(chat, replies, answering, first, pieces), self._ended(answering))
        finally:
            if not handed:
                self.scheduler.release()

    async def _streamed(
        self, chat: ChatRequest, replies: Replies, answering: Answering, first: str, pieces: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        """The events of a stream."""
        yield _event(replies.piece({"role": "assistant", "content": first}))
        try:
            async for piece in pieces:
                yield _event(replies.piece({"content": piece}))
        except Refused as error:
            yield _event(error_body(str(error), error.status))
            return
        yield _event(replies.piece({}, answering.reason))
        if chat.with_usage:
            yield _event(replies.last(answering.tokens))
        yield "data: [DONE]\n\n"

    def _ended(self, answering: Answering) -> Callable[[], None]:
        """What is to be done when a stream has ended, however it did."""

        def end() -> None:
            answering.cancel()
            self.scheduler.release()

        return end


class _Stream(StreamingResponse):
    """A stream of events that says when it has ended, even if none of it was sent."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def make_app(server: Server) -> FastAPI:
    """The application of `server`; it starts and ends the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.scheduler.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, server.scheduler.stop)
        server.cooks.shutdown()

    app = FastAPI(title="vtexport", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(error.status)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error_body(str(error), error.status, code), error.status, headers)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        paths = ", ".join(sorted(route.path for route in app.routes if isinstance(route, Route)))
        message = f"{request.method} {request.url.path}: {error.detail}; the server has {paths}"
        return JSONResponse(error_body(message, error.status_code), error.status_code)

    @app.exception_handler(VtexportError)
    async def wrong(_: Request, error: VtexportError) -> Response:
        server.metrics.outcomes.labels("refused").inc()
        return JSONResponse(error_body(str(error), 400), 400)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # Its traceback goes to the log all the same.
        return JSONResponse(error_body(f"the server failed ({type(error).__name__}); see its log", 500), 500)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.chat(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": server.name, "object": "model", "created": server.since, "owned_by": "vtexport"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        alive = server.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
