"""A stand-in for the program `trtllm-serve`: options, imports of custom modules, and the OpenAI server, as 1.2 has them.

    python -m tests.targets.tensorrt_llm_stand_in.trtllm_serve CHECKPOINT [options]

To make it go wrong, `STAND_IN_BUNDLE` names a bundle to load in place of the one that was asked for, and `STAND_IN_FAULT`
is `no-embeds`, which takes no parts of type `image_embeds`, as 1.2.0 does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.targets.tensorrt_llm_stand_in import SITE, chat
from tests.targets.tensorrt_llm_stand_in.server import Server
from tests.targets.tensorrt_llm_stand_in.settings import Settings

FAULT = os.environ.get("STAND_IN_FAULT", "")
#: options of the YAML file -> settings of the stand-in
OPTIONS = {name: name for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "enable_chunked_prefill")}
OPTIONS |= {"tensor_parallel_size": "tensor_parallel", "max_beam_width": "max_beam_width"}


def import_custom_module(folder: Path) -> None:
    """Import `folder` as a package."""
    if "STAND_IN_BUNDLE" in os.environ:
        folder = Path(os.environ["STAND_IN_BUNDLE"]) / folder.name
    sys.path.insert(0, str(folder.parent))
    importlib.import_module(folder.name)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the server is told by flags, and by the file, which wins."""
    told = yaml.safe_load(Path(arguments.options).read_text()) if arguments.options else {}
    cache = told.pop("kv_cache_config", {})
    # Reuse is on by default.
    made: dict[str, Any] = {"enable_block_reuse": cache.pop("enable_block_reuse", True)}
    cache.pop("free_gpu_memory_fraction", None)
    policy = told.pop("scheduler_config", {})
    made["cuda_graphs"] = told.pop("cuda_graph_config", {}) is not None
    unknown = [*cache, *set(policy) - {"capacity_scheduler_policy"}, *set(told) - set(OPTIONS)]
    if unknown:
        raise ValueError(f"unknown options {unknown}")
    if arguments.max_batch_size is not None:
        made["max_batch_size"] = arguments.max_batch_size
    return made | {OPTIONS[name]: value for name, value in told.items()}


class Engine:
    """The server and the thread that steps it; requests that wait are taken into the next step."""

    def __init__(self, folder: str, template: str | None, told: dict[str, Any]) -> None:
        self.server = Server(folder, **told)
        self.changed = threading.Condition()
        self.error: str | None = None
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        path = Path(template) if template else None
        # A path, or a template itself.
        self.template = path.read_text() if path is not None and path.is_file() else template
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.server.waiting or self.server.running)
                try:
                    self.server.step()
                except Exception as error:  # noqa: BLE001 - whatever it is, clients are told
                    traceback.print_exc()
                    self.error = f"{type(error).__name__}: {error}"
                    for request in [*self.server.waiting, *self.server.running]:
                        self.server.cancel(request.py_request_id)
                self.changed.notify_all()

    def submit(self, body: dict[str, Any]) -> tuple[int, int]:
        """The number of the request that a body makes, and the tokens of its prompt."""
        chat.check_fields(body)
        messages, images = chat.conversation(body["messages"], FAULT != "no-embeds")
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        sys.stderr.write(f"prompt: {text!r}\n")
        end = None if body.get("ignore_eos") else self.tokenizer.eos_token_id
        tokens = body.get("max_tokens") or 16
        with self.changed:
            self.error = None
            try:
                number = self.server.submit({"prompt": text, **images}, tokens, end_id=end)
            except ValueError as error:
                raise chat.BadRequestError(str(error)) from error
            self.changed.notify_all()
            return number, self.server.requests[number].prompt_len

    def grown(self, number: int) -> Iterator[list[int]]:
        """The tokens of an answer so far, whenever there are more; the last time all of them."""
        request, seen = self.server.requests[number], 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda more=seen: request.finished or len(request.answer) > more)
                if self.error is not None:
                    raise RuntimeError(self.error)
                done, answer = request.finished, list(request.answer)
            seen = len(answer)
            yield answer
            if done:
                return

    def text(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


class Handler(BaseHTTPRequestHandler):
    """What clients see."""

    engine: Engine
    model: str

    def do_GET(self) -> None:
        """Whether there is anyone, and what is served."""
        if self.path == "/health":
            self._send(200, None)
        elif self.path == "/v1/models":
            entry = {"id": Path(self.model).name, "object": "model"}
            self._send(200, {"object": "list", "data": [entry]})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {"detail": "Not Found"})
            return
        try:
            number, prompt = self.engine.submit(body)
            if body.get("stream"):
                self._stream(body, number, prompt)
                return
            *_, answer = self.engine.grown(number)
        except chat.BadRequestError as error:
            self._send(400, {"object": "error", "message": str(error), "type": "BadRequestError", "code": 400})
        except Exception as error:  # noqa: BLE001 - as above
            self._send(500, {"object": "error", "message": str(error), "type": "InternalServerError", "code": 500})
        else:
            usage = chat.usage_of(prompt, len(answer))
            self._send(200, chat.completion(body, self.engine.text(answer), usage))

    def _stream(self, body: dict[str, Any], number: int, prompt: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        said, answer = "", []
        for answer in self.engine.grown(number):
            if not said and len(answer) == 1:
                self._event(chat.chunk(body, {"role": "assistant", "content": ""}, None))
            text = self.engine.text(answer)
            self._event(chat.chunk(body, {"content": text[len(said) :]}, None))
            said = text
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event(chat.chunk(body, None, chat.usage_of(prompt, len(answer))))
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _send(self, code: int, data: dict[str, Any] | None) -> None:
        content = b"" if data is None else json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Options as `trtllm-serve` has them; of one that comes twice, the last counts."""
    parser = argparse.ArgumentParser("trtllm-serve", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--backend", choices=["pytorch", "tensorrt", "_autodeploy"], default="pytorch")
    parser.add_argument("--custom_module_dirs", type=Path, action="append", default=[])
    parser.add_argument("--chat_template")
    parser.add_argument("--config", "--extra_llm_api_options", dest="options")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_batch_size", type=int)
    parser.add_argument("--log_level", default="info")
    arguments = parser.parse_args()
    if arguments.backend != "pytorch":
        parser.error(f"the stand-in has no backend {arguments.backend}")
    torch.set_num_threads(1)
    sys.path.insert(0, str(SITE))
    importlib.import_module("tensorrt_llm._torch.models")
    for folder in arguments.custom_module_dirs:
        import_custom_module(folder.resolve())
    told = settings(arguments)
    assert set(told) <= set(Settings.__dataclass_fields__)
    Handler.engine, Handler.model = Engine(arguments.model, arguments.chat_template, told), arguments.model
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    sys.stderr.write(f"listening on {arguments.host}:{arguments.port}\n")
    server.serve_forever()


if __name__ == "__main__":
    main()
