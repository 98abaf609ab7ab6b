"""What runs in Triton's Python backend: requests that wait together are answered as one batch, each piece by piece.

A model repository's `model.py` is a subclass of `Answering` that says where its bundle lies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vtexport.deploy.triton.questions import Asked, read, texts
from vtexport.errors import VtexportError, first_line
from vtexport.runtime.generate import Generation
from vtexport.runtime.inputs import admit
from vtexport.runtime.request import Request
from vtexport.runtime.runner import Runner
from vtexport.runtime.text import TextStream
from vtexport.targets.engine import VisionOutput

INPUTS = ("IMAGE", "PROMPT", "MESSAGES", "MAX_NEW_TOKENS", "STREAM")


class Row:
    """A request that is being answered.

    Args:
        triton: the module `triton_python_backend_utils`.
        sender: Triton's response sender of the request.
        request: the request for the engine.
        asked: what was read from it.
        runner: the bundle.
    """

    def __init__(self, triton: Any, sender: Any, request: Request, asked: Asked, runner: Runner) -> None:
        self.request, self.limit = request, asked.max_new_tokens
        #: whether its answer is still going on, and whether any of it was sent
        self.open, self.started = True, False
        self._triton, self._sender, self._stream = triton, sender, asked.stream
        self._ends = runner.bundle.manifest.model.eos_token_ids
        self._text = TextStream(runner.prompter)
        self._count, self._piece, self._tokens = 0, "", list[int]()

    def add(self, token: int, visual_tokens: float) -> None:
        """Take the next token, and send what there is to send; nothing after the answer's end.

        Args:
            token: the token.
            visual_tokens: mean number of visual tokens over the decoder's layers, which the last response tells.
        """
        if not self.open:
            return
        self._count += 1
        self._tokens.append(token)
        self._piece += self._text.add(token)
        ended = token in self._ends
        if ended or self._count == self.limit:
            self._piece += self._text.rest()
            last = {
                "FINISH_REASON": texts(b"stop" if ended else b"length"),
                "VISUAL_TOKENS": np.array([[visual_tokens]], dtype=np.float32),
            }
            self._send(last, final=True)
        elif self._sender.is_cancelled():
            self.open = False
            self._sender.send(flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif self._piece and self._stream:
            self._send({}, final=False)

    def refuse(self, message: str, bad_request: bool) -> None:
        """End the answer with an error, if it has not ended."""
        if self.open:
            self.open = False
            refuse(self._triton, self._sender, message, bad_request)

    def _send(self, more: Mapping[str, Any], final: bool) -> None:
        triton = self._triton
        arrays = {
            "TEXT": texts(self._piece.encode()),
            "TOKEN_IDS": np.array([self._tokens], dtype=np.int32),
            "FINISHED": np.array([[final]], dtype=np.bool_),
            **more,
        }
        response = triton.InferenceResponse([triton.Tensor(name, array) for name, array in arrays.items()])
        self.started, self.open = True, not final
        self._piece, self._tokens = "", []
        self._sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


class Answering:
    """A model of Triton's Python backend that answers with a bundle; Triton calls its methods.

    Attributes:
        bundle: the folder of the bundle.
    """

    bundle: ClassVar[Path]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, on the instance's own GPU if it has one; `args` are Triton's.

        Raises:
            VtexportError: as `Runner.open`; Triton logs it, and the model is not ready.
        """
        self._triton = import_module("triton_python_backend_utils")
        if args["model_instance_kind"] == "GPU":
            import torch

            torch.cuda.set_device(int(args["model_instance_device_id"]))
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._runner = Runner.open(self.bundle, threads=int(parameters.get("threads", {}).get("string_value", "0")))
        self._runner.need_language_model()
        self._runner.engine.load()

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer `requests`, which Triton put together; every one gets its last response, whatever happens."""
        rows = [row for row in map(self._accepted, requests) if row is not None]
        if rows:
            self._answer(rows)

    def _accepted(self, request: Any) -> Row | None:
        """The row of a request; None if it has been refused."""
        triton, sender = self._triton, request.get_response_sender()
        try:
            tensors = {name: triton.get_input_tensor_by_name(request, name) for name in INPUTS}
            asked = read({name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None})
            pictures = self._runner.prompter.grouped(asked.pictures)
            return Row(triton, sender, self._runner.request(pictures, asked.question), asked, self._runner)
        except VtexportError as error:
            refuse(triton, sender, str(error), bad_request=True)
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            refuse(triton, sender, f"{type(error).__name__}: {first_line(error)}", bad_request=False)
        return None

    def _answer(self, rows: Sequence[Row]) -> None:
        try:
            self._generate(rows)
        except VtexportError as error:
            for row in rows:
                # Together, requests may ask for more than each of them alone.
                if row.open and not row.started and len(rows) > 1:
                    self._answer([row])
                else:
                    row.refuse(str(error), bad_request=True)
        except Exception as error:  # noqa: BLE001 - the server must survive
            for row in rows:
                row.refuse(f"{type(error).__name__}: {first_line(error)}", bad_request=False)

    def _generate(self, rows: Sequence[Row]) -> None:
        """Answer `rows`; those that get the same plan as one batch."""
        runner, requests = self._runner, [row.request for row in rows]
        admit(runner.engine, requests, runner.decoding(max(row.limit for row in rows)))
        vision = runner.look(requests)
        buckets = runner.buckets(vision)
        for bucket in map(int, np.unique(buckets)):
            numbers = np.flatnonzero(buckets == bucket)
            seen = vision if len(numbers) == len(rows) else vision.rows(numbers)
            self._decode([rows[number] for number in numbers.tolist()], bucket, seen)

    def _decode(self, rows: Sequence[Row], bucket: int, vision: VisionOutput) -> None:
        runner, plan = self._runner, self._runner.plans[bucket]
        decoding, requests = runner.decoding(max(row.limit for row in rows)), [row.request for row in rows]
        generation = Generation(runner.engine, plan, requests, decoding, bucket=bucket, vision=vision)
        for tokens in generation:
            for number, token in tokens.items():
                rows[number].add(token, plan.mean_visual_tokens)
            if not any(row.open for row in rows):
                break


def refuse(triton: Any, sender: Any, message: str, bad_request: bool) -> None:
    """End a request with an error in one line."""
    kind = triton.TritonError.INVALID_ARG if bad_request else triton.TritonError.INTERNAL
    line = " ".join(message.split())
    if not bad_request:
        triton.Logger.log_error(line)
    response = triton.InferenceResponse(error=triton.TritonError(line, kind))
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
