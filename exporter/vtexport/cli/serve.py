"""vtexport serve."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click
import cloup

from vtexport.cli.arguments import BUNDLE, COUNT, Finite
from vtexport.cli.streams import say
from vtexport.errors import InputError, MissingDependencyError
from vtexport.stopping import Stopped

# Connections that wait to be accepted, as many as uvicorn's own default.
_BACKLOG = 2048


@cloup.command("serve")
@BUNDLE
@cloup.option_group(
    "Where",
    cloup.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all."),
    cloup.option(
        "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="The port; 0 for a free one."
    ),
    cloup.option("--name", help="The model's name in requests.  [default: the folder's name]"),
)
@cloup.option_group(
    "How much at once",
    cloup.option(
        "--slots", default=8, show_default=True, type=click.IntRange(1, 4096), help="Requests that decode together."
    ),
    cloup.option(
        "--queue",
        default=64,
        show_default=True,
        type=click.IntRange(0, 1 << 20),
        help="Requests that wait for a slot; others get 429.",
    ),
    cloup.option(
        "--threads", default=0, type=click.IntRange(0, 1024), help="Threads of the runtime.  [default: its own choice]"
    ),
)
@cloup.option_group(
    "What a request may ask for",
    cloup.option("--max-new-tokens", default=512, show_default=True, type=COUNT, help="Tokens per answer."),
    cloup.option(
        "--max-megabytes", default=20, show_default=True, type=click.IntRange(1, 4096), help="Size of a request."
    ),
    cloup.option(
        "--max-megapixels", default=50, show_default=True, type=click.IntRange(1, 178), help="Size of an image."
    ),
    cloup.option(
        "--timeout",
        default=300.0,
        show_default=True,
        type=Finite(0, 1_000_000, min_open=True),
        help="Seconds per request.",
    ),
    cloup.option(
        "--url-host", "hosts", multiple=True, help="A host whose http(s) image URLs are fetched.  [default: none]"
    ),
)
def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    slots: int,
    queue: int,
    threads: int,
    max_new_tokens: int,
    max_megabytes: int,
    max_megapixels: int,
    timeout: float,
    hosts: tuple[str, ...],
) -> None:
    """Serve a bundle to clients of OpenAI's API: chat completions with images.

    \b
    vtexport serve micro --port 8000
    """
    try:
        import uvicorn

        from vtexport.serve.app import Server, make_app
    except ImportError as error:
        raise MissingDependencyError(str(error.name), extra="serve") from error
    from vtexport.runtime.runner import Runner
    from vtexport.serve.answers import Limits

    runner = Runner.open(bundle, threads)
    runner.engine.admit(slots, 1, 1)
    limits = Limits(max_new_tokens, max_megabytes * 1_000_000, max_megapixels * 1_000_000, timeout, hosts)
    server = Server(runner, name or bundle.resolve().name, limits, slots, queue)
    say(f"open {bundle}", err=True)
    runner.engine.load()
    config = uvicorn.Config(make_app(server), host=host, port=port, log_level="warning", access_log=False)
    listener = _listen(host, port)
    where = f"http://{host}:{listener.getsockname()[1]}/v1"
    say(f"serve model {server.name} at {where}; Ctrl-C ends, after the answers that have begun", err=True)
    # It raises the signal again that it ended by, after the answers that had begun.
    with contextlib.suppress(KeyboardInterrupt, Stopped):
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> Any:
    """The socket to serve on, to which clients may connect at once; they are answered when the server is up."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; give another") from error
    return listener


COMMANDS = {"serve": serve}
