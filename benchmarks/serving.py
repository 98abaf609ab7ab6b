"""Throughput of `vtexport serve`: several clients at once, batched against one request at a time.

    python benchmarks/serving.py [--model half-billion|micro-llava] [--target openvino] [--clients 8] [--requests 3]
                                 [--new-tokens 64] [--slots 1,8] [--against dense] [--json FILE]

Each side is a server of its own, in a process of its own, asked by OpenAI's own client over HTTP; sides with 1 slot answer
one request at a time. Every request asks about an image that no other had. The figures are of whole requests:
preprocessing, vision tower, prefill and pruning are inside. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import openai
from apart import Task, peak_mib, report, wait_until_quiet
from models import half_billion_llava

from vtexport import BuildOptions, build
from vtexport.measure.machine import device_name

QUESTION = "What is shown in this image?"


@contextmanager
def server(bundle: Path, slots: int, most: int) -> Iterator[tuple[Any, int]]:
    """A server of `bundle`: a client of it, and the number of its process."""
    command = [sys.executable, "-m", "vtexport", "serve", str(bundle), "--port", "0", "--slots", str(slots)]
    command += ["--queue", "1000", "--name", "model", "--max-new-tokens", str(most), "--timeout", "3600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/v1", line)))
        try:
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600), process.pid
        finally:
            process.terminate()


def ask(client: Any, seed: int, new_tokens: int) -> dict[str, float]:
    """Seconds to the first token and to the last, of one request."""
    stream = io.BytesIO()
    Task(seed, new_tokens).images(336)[0].save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    start = time.perf_counter()
    answer = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": parts}],
        max_tokens=new_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    first, tokens = 0.0, 0
    for chunk in answer:
        first = first or time.perf_counter() - start
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return {"first_token": first, "total": time.perf_counter() - start, "tokens": tokens}


def measured(client: Any, pid: int, clients: int, requests: int, new_tokens: int) -> dict[str, float]:
    """What `clients` clients with `requests` requests each get together."""
    ask(client, 0, 2)  # what a server prepares for its first request is not counted
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda seed: ask(client, seed, new_tokens), range(1, 1 + clients * requests)))
        wall = time.perf_counter() - start
    if any(answer["tokens"] != new_tokens for answer in answers):
        raise SystemExit("a request was lost or cut short")
    return {
        "requests_per_minute": 60 * len(answers) / wall,
        "tokens_per_second": len(answers) * new_tokens / wall,
        "first_token": median(answer["first_token"] for answer in answers),
        "total": median(answer["total"] for answer in answers),
        "slowest": max(answer["total"] for answer in answers),
        "peak_mib": peak_mib(pid),
    }


def bundles(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[str, float, Path]]:
    """Method, keep ratio and folder of each bundle."""
    half = arguments.model == "half-billion"
    model = str(half_billion_llava(work / "model")) if half else arguments.model
    dtype: Any = arguments.dtype
    for method, keep in (("dense", 1.0), (arguments.method, arguments.keep)):
        print(f"build {method}", flush=True)
        options = BuildOptions(model, keep, method, arguments.target, dtype, self_check=False)
        yield method, keep, build(options, work / method).folder


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--method", default="sparsevlm")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slots", default="1,8")
    parser.add_argument("--busy", action="store_true", help="measure although other programs run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    points: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method, keep, folder in bundles(arguments, Path(scratch)):
            for slots in map(int, arguments.slots.split(",")):
                if not arguments.busy:
                    wait_until_quiet()
                with server(folder, slots, arguments.new_tokens) as (client, pid):
                    found = measured(client, pid, arguments.clients, arguments.requests, arguments.new_tokens)
                points.append({"method": method, "keep": keep, "slots": slots, **found})
                print(points[-1], flush=True)
    names = ("model", "target", "dtype", "clients", "requests", "new_tokens")
    report(
        {"device": device_name(), **{name: vars(arguments)[name] for name in names}, "points": points}, arguments.json
    )


if __name__ == "__main__":
    main()
