"""vtexport serve: what OpenAI's client gets, batches that requests join, limits, faults and the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle, noise_images
from tests.serve.conftest import LIMITS, Running, data_uri, message, serving, wait
from vtexport.cli.serve import _listen
from vtexport.runtime.runner import Runner

QUESTIONS = (
    "how many digits are there?",
    "what digit is red?",
    "where is the seven, and what colour is it, please?",
    "is there a photograph?",
)


def count(running: Running, name: str) -> float:
    """A sample of the server's metrics."""
    text = urllib.request.urlopen(f"{running.url}/metrics").read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"no {name} in {text}"
    return float(found[1])


def post(running: Running, body: bytes) -> tuple[int, dict[str, Any]]:
    """What comes back for a body, however wrong."""
    request = urllib.request.Request(
        f"{running.url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_official_client_gets_what_run_answers(running: Running) -> None:
    picture = noise_images(1)[0]
    expected = running.server.runner.ask([(picture, QUESTIONS[0])], 12)[0]
    answer = running.ask(picture, QUESTIONS[0], max_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.token_ids)
    plan, prompt = running.server.runner.plan, running.server.runner.prompter.prompt(QUESTIONS[0])
    assert answer.usage.prompt_tokens == len(prompt.token_ids) + plan.vision_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in running.client.models.list()] == ["micro"]
    assert json.load(urllib.request.urlopen(f"{running.url}/health")) == {"status": "ok"}


def test_a_stream_has_the_same_text_and_ends_with_usage(running: Running) -> None:
    picture = noise_images(1)[0]
    whole = running.ask(picture, QUESTIONS[1], max_tokens=12)
    chunks = list(
        running.ask(picture, QUESTIONS[1], max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_of_several_turns(running: Running) -> None:
    picture = noise_images(1)[0]
    turns = [message(QUESTIONS[0], picture), {"role": "assistant", "content": "three"}]
    turns.append({"role": "user", "content": QUESTIONS[1]})
    answer = running.client.chat.completions.create(model="micro", messages=turns, max_tokens=6)
    expected = running.server.runner.ask([(picture, turns)], 6)[0]
    assert answer.choices[0].message.content == expected.text


def test_ignore_eos_and_stop(running: Running) -> None:
    picture = noise_images(1)[0]
    answer = running.ask(picture, QUESTIONS[0], max_tokens=20, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].finish_reason == "length"
    text = answer.choices[0].message.content
    stop = text[3:6]
    cut = running.ask(
        picture, QUESTIONS[0], max_tokens=20, stop=["nothing such", stop], extra_body={"ignore_eos": True}
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = running.ask(picture, QUESTIONS[0], max_tokens=20, stop=stop, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == text[: text.index(stop)]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_requests_join_and_leave_a_batch_and_none_is_mixed_up(target: str, build_bundle: BuildBundle) -> None:
    pytest.importorskip(target)
    made = build_bundle(MICRO, 0.25, "sparsevlm", target=target)
    asked = [(picture, QUESTIONS[number % 4], 1 + 3 * number) for number, picture in enumerate(noise_images(12))]
    runner = Runner.open(made)
    # One after the other and to the end, whatever the model's own end is: row after row must get what it gets alone.
    alone = []
    for picture, question, tokens in asked:
        generated = runner.generate(
            [runner.request(picture, question)], replace(runner.decoding(tokens), eos_token_ids=())
        )
        alone.append(runner.prompter.decode(generated[0][0].token_ids))
    with serving(made, slots=4) as running:
        sizes = recorded_sizes(running)
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(
                    lambda one: running.ask(one[0], one[1], max_tokens=one[2], extra_body={"ignore_eos": True}), asked
                )
            )
        assert [answer.choices[0].message.content for answer in answers] == alone
        assert max(sizes) == 4
        assert count(running, 'vtexport_requests_total{outcome="answered"}') == 12
        tokens = sum(tokens for _, _, tokens in asked)
        assert count(running, "vtexport_generated_tokens_total") == tokens
        # Batched, there were fewer steps than tokens.
        assert len(sizes) < tokens - 12


def recorded_sizes(running: Running) -> list[int]:
    """Rows of every decode step from now on."""
    engine, sizes = running.server.runner.engine, []
    decode = engine.decode

    def seen(cache: Any, tokens: Any, *given: Any) -> Any:
        sizes.append(len(tokens))
        return decode(cache, tokens, *given)

    engine.decode = seen  # type: ignore[method-assign]
    return sizes


def test_an_engine_that_cannot_join_answers_batch_after_batch(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's, which lets no row join or leave."""
    with serving(bundle, slots=4) as running:
        engine = running.server.runner.engine
        monkeypatch.setattr(engine, "join", lambda cache, other: False)
        monkeypatch.setattr(engine, "retain", lambda cache, rows: False)
        asked = [(picture, QUESTIONS[number % 4]) for number, picture in enumerate(noise_images(10))]
        alone = [running.server.runner.ask([pair], 8)[0].text for pair in asked]
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda pair: running.ask(*pair, max_tokens=8), asked))
        assert [answer.choices[0].message.content for answer in answers] == alone


def test_keep_auto_batches_by_plan(build_bundle: BuildBundle) -> None:
    made = build_bundle("micro-llava", "auto", "sparsevlm", buckets=(0.5, 0.25), target_accuracy=0.9)
    with serving(made, slots=8) as running:
        asked = [(picture, QUESTIONS[number % 4]) for number, picture in enumerate(noise_images(8))]
        alone = [running.server.runner.ask([pair], 8)[0].text for pair in asked]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda pair: running.ask(*pair, max_tokens=8), asked))
        assert [answer.choices[0].message.content for answer in answers] == alone


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "temperature": ({"temperature": 0.7}, 400, "temperature 0.7 has no effect here"),
    "several": ({"n": 2}, 400, "n 2 has no effect here"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "leave tools out"),
    "unknown": ({"frobnicate": 1}, 400, "frobnicate: Extra inputs are not permitted"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    "both": ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens has no effect beside"),
    "many tokens": ({"max_tokens": 65}, 400, "max_tokens 65 is more than the server's 64"),
    "usage": ({"stream_options": {"include_usage": True}}, 400, "stream_options has no effect without stream"),
    "stops": ({"stop": ["a"] * 5}, 400, "stop takes up to four texts"),
    "model": ({"model": "other"}, 404, "there is no model 'other' here; ask for 'micro'"),
    "no messages": ({"messages": []}, 400, "messages: List should have at least 1 item"),
    "no image": ({"messages": [{"role": "user", "content": "hello"}]}, 400, "0 image_url parts, this model takes 1"),
    "order": ({"messages": [message("a"), message("b")]}, 400, "0 image_url parts"),
}
URLS: dict[str, tuple[Any, str]] = {
    "file": ("file:///etc/passwd", "neither a data URI nor http(s)"),
    "host": ("http://169.254.169.254/latest", "takes no image URLs of host 169.254.169.254; send a data URI"),
    "not base64": ("data:image/png,abc", "is not in base64"),
    "broken base64": ("data:image/png;base64,@@@", "is no valid base64"),
    "no image": ("data:image/png;base64,aGVsbG8=", "an image is not readable"),
    "no text": (7, "an image_url part has no URL"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_line(name: str, running: Running) -> None:
    changed, status, said = BAD[name]
    body = {"model": "micro", "messages": [message("what?", noise_images(1)[0])], **changed}
    found, answer = post(running, json.dumps(body).encode())
    assert found == status
    assert said in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("name", URLS)
def test_bad_images_are_one_line(name: str, running: Running) -> None:
    url, said = URLS[name]
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    status, answer = post(
        running, json.dumps({"model": "micro", "messages": [{"role": "user", "content": parts}]}).encode()
    )
    assert status == 400
    assert said in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": ' + b"[" * 100000])
def test_bodies_that_are_no_request(body: bytes, running: Running) -> None:
    status, answer = post(running, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_paths_say_what_there_is(running: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{running.url}/v1/completions")
    assert caught.value.code == 404
    said = json.load(caught.value)["error"]["message"]
    assert said.startswith("GET /v1/completions: Not Found; the server has /health, /metrics, /v1/chat/completions")


def test_large_requests_and_images_are_refused(bundle: Path) -> None:
    with serving(bundle, limits=replace(LIMITS, request_bytes=50_000, pixels=10_000)) as running:
        status, answer = post(running, b" " * 50_001)
        assert status == 413
        assert "more than the server's 50000 bytes" in answer["error"]["message"]
        with pytest.raises(openai.BadRequestError, match="101 x 100 pixels, and 10000 can be taken"):
            running.ask(noise_images(1)[0].resize((101, 100)).quantize(2), "what?")


def test_urls_of_allowed_hosts_are_fetched(bundle: Path, photo: Path) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(photo.parent))

        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.2/secret")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *given: Any) -> None: ...

    files = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{files.server_port}"
    with serving(bundle, limits=replace(LIMITS, hosts=("127.0.0.1",))) as running:
        expected = running.server.runner.ask([(running.server.runner.prompter.open_pictures([photo]), "what?")], 6)[0]

        def ask(url: str) -> Any:
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
            return running.client.chat.completions.create(
                model="micro", messages=[{"role": "user", "content": parts}], max_tokens=6
            )

        assert ask(f"{base}/{photo.name}").choices[0].message.content == expected.text
        for path, said in (("/elsewhere", "status 302"), ("/missing", "status 404")):
            with pytest.raises(openai.BadRequestError, match=said):
                ask(base + path)
    files.shutdown()


def slowed(running: Running, seconds: float) -> None:
    """Let every decode step take `seconds` at least."""
    engine = running.server.runner.engine
    decode = engine.decode

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return decode(*given)

    engine.decode = slow  # type: ignore[method-assign]


def test_a_full_server_says_so_and_answers_the_others(bundle: Path) -> None:
    with serving(bundle, slots=1, queue=1) as running:
        slowed(running, 0.1)
        picture = noise_images(1)[0]
        with ThreadPoolExecutor(6) as pool:
            asked = [
                pool.submit(running.ask, picture, "what?", max_tokens=8, extra_body={"ignore_eos": True})
                for _ in range(6)
            ]
            errors = [future.exception() for future in asked]
        refused = [error for error in errors if error is not None]
        assert len(refused) == 4
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert error.response.headers["retry-after"] == "1"
        assert count(running, 'vtexport_requests_total{outcome="rejected"}') == 4
        running.ask(picture, "what?", max_tokens=2)


def test_a_client_that_leaves_frees_its_slot(bundle: Path) -> None:
    with serving(bundle, slots=1, queue=0) as running:
        slowed(running, 0.05)
        stream = running.ask(noise_images(1)[0], "what?", max_tokens=64, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        assert running.server.scheduler.decoding == 1
        stream.close()
        wait(running.idle)
        assert count(running, 'vtexport_requests_total{outcome="cancelled"}') == 1
        # The same without a stream: the client gives up by itself.
        hasty = running.client.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            hasty.chat.completions.create(
                model="micro",
                messages=[message("what?", noise_images(1)[0])],
                max_tokens=64,
                extra_body={"ignore_eos": True},
            )
        wait(running.idle)
        assert running.ask(noise_images(1)[0], "what?", max_tokens=2).choices


def test_a_request_that_takes_too_long_is_given_up(bundle: Path) -> None:
    with serving(bundle, limits=replace(LIMITS, seconds=0.5)) as running:
        slowed(running, 0.2)
        with pytest.raises(openai.InternalServerError, match="longer than the server's --timeout"):
            running.ask(noise_images(1)[0], "what?", max_tokens=64, extra_body={"ignore_eos": True})
        wait(running.idle)
        stream = running.ask(noise_images(1)[0], "what?", max_tokens=64, stream=True, extra_body={"ignore_eos": True})
        with pytest.raises(openai.APIError, match="longer than"):
            list(stream)


def test_a_failing_engine_fails_one_batch_and_not_the_server(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(bundle) as running:
        engine = running.server.runner.engine
        real, broken = engine.prefill, []

        def fails(*given: Any) -> Any:
            broken.append(1)
            raise RuntimeError("out of memory")

        engine.prefill = fails  # type: ignore[method-assign]
        with pytest.raises(openai.InternalServerError, match="the engine failed; the server's log says why"):
            running.ask(noise_images(1)[0], "what?", max_tokens=2)
        assert broken
        assert "out of memory" in caplog.text
        engine.prefill = real  # type: ignore[method-assign]
        assert running.ask(noise_images(1)[0], "what?", max_tokens=2).choices


def test_bundles_that_cannot_be_served_are_refused(vtexport: Any, build_bundle: BuildBundle) -> None:
    ranked = build_bundle(MICRO, 0.25, "sgl", self_check=False)
    done = vtexport("serve", ranked)
    assert done.code == 2
    assert "prunes by another bundle's ranking" in done.err
    done = vtexport("serve", build_bundle(MICRO, 0.25, "sparsevlm"), "--host", "no.such.host.invalid")
    assert done.code == 2
    assert "--host no.such.host.invalid --port 8000:" in done.err


def test_clients_may_connect_before_the_server_is_up() -> None:
    with contextlib.closing(_listen("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname(), timeout=10).close()


def accepted(metrics: str) -> float:
    """Requests that wait, run or were answered."""
    names = r"^vtexport_requests_(?:waiting|running|total\{outcome=\"answered\"\}) (\S+)$"
    return sum(map(float, re.findall(names, metrics, re.MULTILINE)))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_sigterm_under_load_finishes_what_was_accepted(bundle: Path) -> None:
    command = [sys.executable, "-m", "vtexport", "serve", str(bundle), "--port", "0", "--slots", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://\S+/v1", line)))
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        picture = noise_images(1)[0]

        def ask(number: int) -> Any:
            return client.chat.completions.create(
                model=bundle.name,
                messages=[message(QUESTIONS[number % 4], picture)],
                max_tokens=400,
                extra_body={"ignore_eos": True},
            )

        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, number) for number in range(6)]
            metrics = url.removesuffix("/v1") + "/metrics"
            try:
                wait(lambda: accepted(urllib.request.urlopen(metrics).read().decode()) == 6)
            finally:
                process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        assert [answer.usage.completion_tokens for answer in answers] == [400] * 6
        assert process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            ask(0)


def test_images_are_seen_once(running: Running) -> None:
    """A second question about an image takes the vision stage's outputs from the cache."""
    engine, looks = running.server.runner.engine, []
    real = engine.vision

    def seen(inputs: Any) -> Any:
        looks.append(len(inputs.pixel_values))
        return real(inputs)

    engine.vision = seen  # type: ignore[method-assign]
    picture = noise_images(1)[0].rotate(90)
    for question in QUESTIONS:
        running.ask(picture, question, max_tokens=2)
    assert looks == [1]
    assert data_uri(picture).startswith("data:image/png;base64,")


def resident(pid: int) -> int:
    """Megabytes of a process's memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) >> 10


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_64_clients_none_is_lost_or_mixed_up_and_memory_stays(bundle: Path) -> None:
    """Four rounds of 5 requests per client, about 16 images."""
    runner, pictures = Runner.open(bundle), noise_images(16)
    expected = {
        (number, question): runner.ask([(picture, question)], 16)[0].text
        for number, picture in enumerate(pictures)
        for question in QUESTIONS
    }
    assert len(set(expected.values())) > 8
    command = [
        sys.executable,
        "-m",
        "vtexport",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--queue",
        "400",
        "--name",
        "micro",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/v1", line)))

        def wrong(number: int) -> int:
            """How many of a client's requests got another answer than theirs."""
            client, count = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300), 0
            for turn in range(5):
                which, question = (7 * number + turn) % 16, QUESTIONS[(number + turn) % 4]
                answer = client.chat.completions.create(
                    model="micro", messages=[message(question, pictures[which])], max_tokens=16
                )
                count += answer.choices[0].message.content != expected[which, question]
            return count

        memory = []
        for _ in range(4):
            with ThreadPoolExecutor(64) as pool:
                assert sum(pool.map(wrong, range(64))) == 0
            memory.append(resident(process.pid))
        process.terminate()
    assert memory[-1] < memory[1] + 40, memory
