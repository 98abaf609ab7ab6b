"""A stand-in for `triton_python_backend_utils`, which exists only inside Triton's Python backend, and for its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
#: what was logged as an error
logged: list[str] = []


class TritonError:
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        assert array.ndim == 2, "a batch of one"
        assert len(array) == 1, "a batch of one"
        self.name, self._array = name, array

    def as_numpy(self) -> Any:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy()[0] for tensor in output_tensors or []}
        self.error = error


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        logged.append(message)


@dataclass
class Sender:
    """A request's response sender: what was sent, and after how many responses the client goes away."""

    leaves_after: int | None = None
    responses: list[InferenceResponse] = field(default_factory=list)
    closed: bool = False

    def is_cancelled(self) -> bool:
        return self.leaves_after is not None and len(self.responses) >= self.leaves_after

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.closed, "nothing is sent behind the last response"
        assert response is not None or flags, "an empty response can only be the last"
        if response is not None:
            self.responses.append(response)
        self.closed = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass
class Request:
    """A request with its inputs as Triton hands them over: [1, n] each, texts as bytes."""

    inputs: Mapping[str, Any]
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender

    @property
    def error(self) -> TritonError:
        (response,) = self.sender.responses
        assert self.sender.closed
        assert response.error is not None
        return response.error

    def joined(self) -> tuple[str, list[int]]:
        """The text and the tokens of the whole answer."""
        assert self.sender.closed
        pieces = [response.outputs for response in self.sender.responses]
        assert [bool(piece["FINISHED"][0]) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        text = b"".join(piece["TEXT"][0] for piece in pieces).decode()
        return text, [int(token) for piece in pieces for token in piece["TOKEN_IDS"]]

    @property
    def last(self) -> Mapping[str, Any]:
        return self.sender.responses[-1].outputs


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    if name not in request.inputs:
        return None
    tensor = Tensor.__new__(Tensor)
    # A client may send any number of rows.
    tensor.name, tensor._array = name, request.inputs[name]
    return tensor
