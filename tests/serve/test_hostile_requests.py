"""Requests that are broken or meant to harm: each gets a status of its own fault in OpenAI's form, and the server goes on."""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.conftest import noise_images
from tests.serve.conftest import Running, data_uri, message

PICTURE = noise_images(1)[0]
DEEP = "[" * 100_000


def body(**more: Any) -> dict[str, Any]:
    return {"model": "micro", "messages": [message("what digit is red?", PICTURE)], "max_tokens": 2, **more}


def text_of(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def bomb() -> str:
    stream = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(stream, "TIFF", compression="group4")
    return f"data:image/tiff;base64,{base64.b64encode(stream.getvalue()).decode()}"


def post(running: Running, data: bytes, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(running.url.rsplit(":", 1)[1]), timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


RAW = {
    "nothing": b"",
    "no UTF-8": b'{"model": "\xff"}',
    "UTF-16": json.dumps(body()).encode("utf-16"),
    "cut": json.dumps(body()).encode()[:-20],
    "deep": DEEP.encode(),
    "deep metadata": json.dumps(body(metadata={"a": 0})).replace('"a": 0', f'"a": {DEEP}').encode(),
    "a list": b"[]",
    "a number": b"1e999",
    "NaN": b"NaN",
    "a long number": b"9" * 10_000,
    "twice": json.dumps(body()).encode() * 2,
    "lone surrogate in model": json.dumps(body(model="\ud800")).encode(),
    "lone surrogate in text": json.dumps(
        body(messages=text_of(image("URL"), {"type": "text", "text": "\ud800"}))
    ).encode(),
    "lone surrogate in n": json.dumps(body(n="\ud800")).encode(),
    "lone surrogate in role": json.dumps(body(messages=[{"role": "\ud800", "content": "a"}])).encode(),
    "lone surrogate in a key": json.dumps(body(**{"\ud800": 1})).encode(),
    "lone surrogate in stop": json.dumps(body(stop="\ud800")).encode(),
    "infinite n": json.dumps(body(n=float("inf"))).encode(),
}

VALUES: list[dict[str, Any]] = [
    {"model": "x\r\nSet-Cookie: a=b\x00\x1b[31m"},
    {"model": "m" * 100_000},
    {"n": 2},
    {"n": "9" * 100_000},
    *({"max_tokens": value} for value in (0, -1, 10**12, 10**30, "two", "2", 1.5, True, [], float("nan"))),
    {"max_completion_tokens": 10**9},
    {"messages": []},
    {"messages": "text"},
    {"messages": [1]},
    {"messages": [{}]},
    {"messages": [{"role": ["user"], "content": "a"}]},
    {"messages": [{"role": "r" * 100_000, "content": "a"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": "a"}] * 10_000},
    {"messages": text_of(*[{"type": "text", "text": "a"}] * 20_000, image(data_uri(PICTURE)))},
    {"messages": text_of({"type": "text", "text": "a " * 500_000}, image(data_uri(PICTURE)))},
    {"messages": text_of(*[image("data:image/png;base64,")] * 10_000)},
    {"messages": text_of({"type": "image_url"}, {"type": "text", "text": "a"})},
    {"messages": text_of({"type": "image_url", "image_url": {"url": data_uri(PICTURE), "detail": ["high"] * 9999}})},
    *(
        {"messages": text_of(image(url), {"type": "text", "text": "a"})}
        for url in (
            "file:///etc/passwd",
            "http://localhost:1/",
            "http://127.0.0.1:1/",
            "http://[::1",
            "http://[::ffff:127.0.0.1]/",
            "http://user:pass@localhost/",
            "HTTP://LOCALHOST/",
            "http://",
            "https:localhost",
            "http://a b/\r\nHost: localhost",
            "ftp://localhost/",
            "//localhost/",
            "",
            "\0",
            "data:",
            "data:,",
            "data:text/html;base64,PGI+",
            "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=",
            "data:image/png;base64,%%%%",
            "data:image/png;base64,é",
            None,
            {},
        )
    ),
    {"messages": text_of(image(bomb()), {"type": "text", "text": "a"})},
    {"stop": ["a"] * 5},
    {"stop": [None]},
    {"stop": {}},
    {"stream": "maybe"},
    {"stream": True, "max_tokens": 0},
    {"stream_options": {"include_usage": True}},
    {"response_format": {"type": "json_object"}},
    {"unknown": 1},
]


def check(answer: tuple[int, bytes]) -> None:
    """A status of the client's fault, and OpenAI's form of an error, in one short line."""
    status, data = answer
    assert 400 <= status < 500, answer
    error = json.loads(data)["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("name", RAW)
def test_bodies(name: str, running: Running) -> None:
    check(post(running, RAW[name]))
    check_alive(running)


def test_values(running: Running) -> None:
    for more in VALUES:
        answer = post(running, json.dumps(body(**more)).encode())
        assert answer[0] != 200, json.dumps(more)[:200]
        check(answer)
    check_alive(running)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "5"},
        {"Content-Type": "text/plain"},
        {"Authorization": "Bearer " + "a" * 10_000},
        {"X-Long": "a" * 60_000},
        {"Content-Type": "application/json; charset=utf-32"},
        {"Transfer-Encoding": "gzip"},
    ],
)
def test_headers(headers: dict[str, str], running: Running) -> None:
    status, _ = post(running, json.dumps(body()).encode(), **headers)
    assert status < 500
    check_alive(running)


def check_alive(running: Running) -> None:
    """The next request is answered, and no place is lost."""
    status, data = post(running, json.dumps(body()).encode())
    assert status == 200
    assert json.loads(data)["usage"]["completion_tokens"] == 2
    assert running.server.scheduler.taken == 0
