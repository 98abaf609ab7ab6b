"""A real tritonserver, where there is one: on the PATH, or named by the environment variable VTEXPORT_TRITONSERVER.

What is named takes tritonserver's options, and its Python backend finds vtexport (docs/triton.md).
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.deploy.model_config import parsed
from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST, encode
from vtexport.deploy.roads import ROADS, deploy
from vtexport.micro import heldout
from vtexport.models.pictures import open_image
from vtexport.runtime.runner import Runner

ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("VTEXPORT_TRITONSERVER") or shutil.which("tritonserver")
pytestmark = pytest.mark.skipif(
    SERVER is None, reason="no tritonserver: none on the PATH, and VTEXPORT_TRITONSERVER is not set"
)
EXAMPLES = list(heldout.examples(8))
START_S, STOP_S = 180, 60


@dataclass
class Running:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    models: Path
    log: Path

    def call(self, path: str, body: Any = None) -> bytes:
        """What the server answers to a GET, or to a POST of JSON.

        Raises:
            urllib.error.HTTPError: it refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://localhost:{self.http}/{path}", data, timeout=60) as reply:
            return bytes(reply.read())

    @contextmanager
    def reply(self, **inputs: Any) -> Iterator[http.client.HTTPResponse]:
        """The reply to a request about the first example, to be read piece by piece; its connection closes behind it."""
        body = {"IMAGE": url(EXAMPLES[0].image), "PROMPT": EXAMPLES[0].question.text, **inputs}
        with closing(http.client.HTTPConnection("localhost", self.http, timeout=60)) as connection:
            connection.request("POST", "/v2/models/vtexport/generate_stream", json.dumps(body))
            with connection.getresponse() as reply:
                yield reply

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def stream(self, **inputs: Any) -> list[dict[str, Any]]:
        """The responses to a request, as they came."""
        events = self.call("v2/models/vtexport/generate_stream", inputs).decode().split("\n\n")
        return [json.loads(event.removeprefix("data:")) for event in events if event.strip()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def started(models: Path, log: Path) -> Running:
    """A server for the repository that is ready."""
    http, grpc, metrics = free_port(), free_port(), free_port()
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    command = [str(SERVER), f"--model-repository={models}", *ports]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    running = Running(process, http, grpc, models, log)
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            running.call("v2/health/ready")
            return running
        except OSError:
            time.sleep(0.5)
    process.kill()
    process.wait()
    pytest.fail(f"the server did not become ready:\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture(scope="module")
def server(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("triton")
    deploy(Bundle.open(micro_bundle), ROADS["triton"], folder / "out")
    running = started(folder / "out" / "models", folder / "log")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def endless_bundle(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers end at their limit alone."""
    folder = tmp_path_factory.mktemp("endless") / "bundle"
    shutil.copytree(micro_bundle, folder)
    manifest = Bundle.open(folder).manifest
    model = msgspec.structs.replace(manifest.model, eos_token_ids=[])
    (folder / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, model=model)))
    return folder


@pytest.fixture(scope="module")
def endless(endless_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("triton")
    deploy(Bundle.open(endless_bundle), ROADS["triton"], folder / "out")
    running = started(folder / "out" / "models", folder / "log")
    yield running
    running.stop()


def url(image: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def expected(micro_runner: Runner) -> list[Any]:
    """The answers of `vtexport run`."""
    from PIL import Image

    return [micro_runner.ask([(Image.fromarray(e.image), e.question.text)])[0] for e in EXAMPLES]


def tokens(pieces: list[dict[str, Any]]) -> list[int]:
    found: list[int] = []
    for piece in pieces:
        ids = piece["TOKEN_IDS"]
        # The endpoint writes a tensor of one element as a number.
        found += ids if isinstance(ids, list) else [ids]
    return found


def test_triton_reads_the_configuration_as_it_was_written(server: Running) -> None:
    own, theirs = (
        parsed((server.models / "vtexport" / "config.pbtxt").read_text()),
        json.loads(server.call("v2/models/vtexport/config")),
    )
    assert theirs["model_transaction_policy"] == {"decoupled": True}
    assert theirs["max_batch_size"] == own.max_batch_size
    for ports, entries in ((own.input, theirs["input"]), (own.output, theirs["output"])):
        assert [port.name for port in ports] == [entry["name"] for entry in entries]
        assert [list(port.dims) for port in ports] == [entry["dims"] for entry in entries]


def test_requests_at_the_same_time_get_the_tokens_of_vtexport_run(server: Running, expected: list[Any]) -> None:
    def ask(number: int) -> list[dict[str, Any]]:
        example = EXAMPLES[number % len(EXAMPLES)]
        return server.stream(IMAGE=url(example.image), PROMPT=example.question.text)

    with ThreadPoolExecutor(16) as pool:
        streams = list(pool.map(ask, range(32)))
    for number, pieces in enumerate(streams):
        answer = expected[number % len(EXAMPLES)]
        assert tokens(pieces) == answer.token_ids
        assert "".join(piece["TEXT"] for piece in pieces) == answer.text
        assert [piece["FINISHED"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1]["FINISH_REASON"] == "stop"
        assert pieces[-1]["VISUAL_TOKENS"] == answer.visual_tokens["mean"]
    assert max(map(len, streams)) > 2, "answers come in pieces"
    (statistics,) = json.loads(server.call("v2/models/vtexport/stats"))["model_stats"]
    assert statistics["execution_count"] < statistics["inference_count"], "waiting requests were answered together"


def test_an_answer_at_once_needs_no_stream(server: Running, expected: list[Any]) -> None:
    body = {"IMAGE": url(EXAMPLES[0].image), "PROMPT": EXAMPLES[0].question.text, "STREAM": False, "MAX_NEW_TOKENS": 1}
    answer = json.loads(server.call("v2/models/vtexport/generate", body))
    assert tokens([answer]) == expected[0].token_ids[:1]
    assert answer["FINISHED"] is True


def test_bad_requests_are_refused_and_the_server_goes_on(server: Running, expected: list[Any]) -> None:
    image, prompt = url(EXAMPLES[0].image), EXAMPLES[0].question.text
    bad = {
        "IMAGE 1 is not a readable image": {"IMAGE": "no image", "PROMPT": prompt},
        "give one of them": {"IMAGE": image},
        "MAX_NEW_TOKENS is 0; give 1 or more": {"IMAGE": image, "PROMPT": prompt, "MAX_NEW_TOKENS": 0},
        "exceed the model's": {"IMAGE": image, "PROMPT": prompt, "MAX_NEW_TOKENS": 100_000},
        "MESSAGES is not JSON": {"IMAGE": image, "MESSAGES": "["},
    }

    def ask(case: tuple[str, dict[str, Any]]) -> str:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.call("v2/models/vtexport/generate_stream", case[1])
        assert refused.value.code == 400
        return refused.value.read().decode()

    with ThreadPoolExecutor(8) as pool:
        good = pool.submit(server.stream, IMAGE=image, PROMPT=prompt)
        for message, said in zip(bad, pool.map(ask, bad.items()), strict=True):
            assert message in said
        assert tokens(good.result()) == expected[0].token_ids
    assert server.call("v2/health/ready") == b""


def test_the_client_of_the_page_gets_its_answer(server: Running, micro_runner: Runner) -> None:
    pytest.importorskip("tritonclient.grpc")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "triton.md").read_text("utf-8"), re.DOTALL)
    code = code.replace("localhost:8001", f"localhost:{server.grpc}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    image = open_image(ROOT / "engines" / "micro-llava" / "example.png")
    (answer,) = micro_runner.ask([(image, "what digit is red?")])
    assert (done.returncode, done.stdout) == (0, answer.text), done.stderr


def test_pieces_come_while_the_answer_is_made(endless: Running) -> None:
    start = time.monotonic()
    with endless.reply(MAX_NEW_TOKENS=400) as reply:
        reply.readline()
        first = time.monotonic() - start
        rest = reply.read()
    assert rest.count(b"TOKEN_IDS") > 100
    assert first < 0.5 * (time.monotonic() - start)


def test_a_client_that_goes_away_holds_up_nobody(endless: Running) -> None:
    def seconds(reading: bool) -> float:
        start = time.monotonic()
        with endless.reply(MAX_NEW_TOKENS=1600) as reply:
            reply.read() if reading else reply.readline()
        with endless.reply(MAX_NEW_TOKENS=1) as reply:
            assert b"length" in reply.read()
        return time.monotonic() - start

    whole = seconds(reading=True)
    assert seconds(reading=False) < 0.5 * whole


def test_the_server_finishes_what_it_was_asked_and_stops(endless_bundle: Path, tmp_path: Path) -> None:
    deploy(Bundle.open(endless_bundle), ROADS["triton"], tmp_path / "out")
    running = started(tmp_path / "out" / "models", tmp_path / "log")
    with ExitStack() as stack:
        replies = [stack.enter_context(running.reply(MAX_NEW_TOKENS=400)) for _ in range(4)]
        for reply in replies:
            reply.readline()
        running.process.send_signal(signal.SIGTERM)
        for reply in replies:
            events = reply.read().decode().strip().split("\n\n")
            assert json.loads(events[-1].removeprefix("data:"))["FINISH_REASON"] == "length"
    assert running.process.wait(STOP_S) == 0
    assert "Traceback" not in running.log.read_text(errors="replace")
