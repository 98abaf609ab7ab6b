"""A server of a bundle in this process, and OpenAI's own client."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle
from vtexport.runtime.runner import Runner
from vtexport.serve.answers import Limits
from vtexport.serve.app import Server, make_app

LIMITS = Limits(new_tokens=64, request_bytes=1 << 20, pixels=1_000_000, seconds=60)


@dataclass
class Running:
    """A server, the URL of its API, and a client."""

    server: Server
    url: str
    client: Any

    def ask(self, picture: Any, question: str, **options: Any) -> Any:
        """A chat completion of one question about a PIL image."""
        return self.client.chat.completions.create(
            model=self.server.name, messages=[message(question, picture)], **options
        )

    def idle(self) -> bool:
        """Whether no request has a place, a slot or a turn; a place is given back after its slot, or before it."""
        scheduler = self.server.scheduler
        return scheduler.taken == scheduler.decoding == scheduler.waiting == 0


Serving = Callable[..., AbstractContextManager[Running]]


def message(question: str, *pictures: Any) -> dict[str, Any]:
    """A user's message with images."""
    parts = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def data_uri(picture: Any) -> str:
    """A PIL image as a PNG in a data URI."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@contextmanager
def serving(bundle: Path, slots: int = 4, queue: int = 64, limits: Limits = LIMITS) -> Iterator[Running]:
    """A server of `bundle` in a thread."""
    runner = Runner.open(bundle)
    runner.engine.load()
    server = Server(runner, "micro", limits, slots, queue)
    web = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    wait(lambda: web.started)
    port = web.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        yield Running(server, url, client)
    finally:
        web.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def bundle(build_bundle: BuildBundle) -> Path:
    """micro-llava with sparsevlm at 0.25."""
    return build_bundle(MICRO, 0.25, "sparsevlm")


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[Running]:
    with serving(bundle) as made:
        yield made
