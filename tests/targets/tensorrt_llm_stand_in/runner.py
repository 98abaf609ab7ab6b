"""Passes that are recorded, one for each size of batch, in the way of TensorRT-LLM's runner of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.targets.tensorrt_llm_stand_in.graphs import Graph
from tests.targets.tensorrt_llm_stand_in.requests import CUDA_GRAPH_DUMMY_REQUEST_ID, LlmRequest


def dummy_requests(manager: Any, ids: list[int], tokens: list[int], generation: bool) -> list[LlmRequest]:
    """Requests with the token 1 and blocks of their own; as generations, they have a prompt that no one has computed."""
    made = []
    for request_id, count in zip(ids, tokens, strict=True):
        request = LlmRequest(request_id, [1] * count, 1, is_dummy=True)
        manager.add_sequence(request_id, count)
        if generation:
            request.py_prompt_len = request.prompt_len = count - 1
            request.context_current_position = count - 1
        made.append(request)
    return made


class Runner:
    """Recorded passes and what they share: inputs, and the buffers of their metadata."""

    WARMUP_STEPS = 2

    def __init__(self, max_batch_size: int) -> None:
        from tensorrt_llm._torch.memory_buffer_utils import Buffers

        self.sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= max_batch_size]
        self.buffers = Buffers()
        self.input_ids = torch.ones(max_batch_size, dtype=torch.int)
        self.position_ids = torch.zeros(1, max_batch_size, dtype=torch.int)
        self.graphs: dict[int, Graph] = {}
        self.outputs: dict[int, Any] = {}
        self.metadata: dict[int, Any] = {}
        self.dummy: LlmRequest | None = None
        self.replays = 0

    def padding(self, count: int, manager: Any) -> list[LlmRequest]:
        """What to add to `count` generations so that their number is one of the sizes: one request, several times."""
        size = next((size for size in self.sizes if size >= count), count)
        if size > count and self.dummy is None:
            (self.dummy,) = dummy_requests(manager, [CUDA_GRAPH_DUMMY_REQUEST_ID], [1], generation=True)
            self.dummy.is_cuda_graph_dummy = True
        return [self.dummy] * (size - count)

    def metadata_for(self, size: int, eager: Any) -> Any:
        """The metadata of recorded passes of that size."""
        if size not in self.metadata:
            self.metadata[size] = eager.create_cuda_graph_metadata(size, False, 0, self.buffers)
            assert self.metadata[size].is_cuda_graph
        return self.metadata[size]

    def run(self, inputs: dict[str, Any], forward: Callable[[dict[str, Any]], Any]) -> Any:
        """The recorded pass with new inputs; recorded first if it was not yet."""
        size = inputs["input_ids"].shape[0]
        if size not in self.graphs:
            static = {"input_ids": self.input_ids[:size], "position_ids": self.position_ids[:, :size]}
            for _ in range(self.WARMUP_STEPS):
                forward(inputs | static)
            self.graphs[size] = Graph()
            with self.graphs[size]:
                self.outputs[size] = forward(inputs | static)
        assert inputs["attn_metadata"] is self.metadata[size]
        self.input_ids[:size].copy_(inputs["input_ids"])
        self.position_ids[:, :size].copy_(inputs["position_ids"])
        self.graphs[size].replay()
        self.replays += 1
        return self.outputs[size]
