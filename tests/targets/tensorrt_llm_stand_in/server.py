"""A server on one device: requests in, tokens out, in the way of TensorRT-LLM's executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.targets.tensorrt_llm_stand_in.engine import Engine
from tests.targets.tensorrt_llm_stand_in.requests import LlmRequest
from tests.targets.tensorrt_llm_stand_in.settings import Settings


class Server(Engine):
    """Serves one checkpoint while the stand-in is installed.

    Args:
        folder: the checkpoint.
        **settings: the fields of `Settings`.
    """

    def __init__(self, folder: str | Path, **settings: Any) -> None:
        self.processor: Any = None
        self.requests: dict[int, LlmRequest] = {}
        self.waiting: list[LlmRequest] = []
        self.running: list[LlmRequest] = []
        self.next_id = 1
        super().__init__(Path(folder), Settings(**settings))

    def submit(
        self,
        prompt: dict[str, Any],
        max_tokens: int,
        request_id: int | None = None,
        end_id: int | None = None,
        truncate: int | None = None,
    ) -> int:
        """Put a request in the queue.

        Args:
            prompt: `prompt` with `multi_modal_data` or `multi_modal_embeddings`, or `prompt_token_ids`.
            max_tokens: how many to generate.
            request_id: which number it shall have; that of a request that has ended may be used again.
            end_id: a token that ends it.
            truncate: `truncate_prompt_tokens` of the sampling parameters.

        Returns:
            its number.
        """
        tokens, extra = prompt.get("prompt_token_ids"), None
        if tokens is None:
            tokens, extra = self._process(prompt, max_tokens, truncate)
        if request_id is None:
            request_id, self.next_id = self.next_id, self.next_id + 1
        if request_id in self.requests and not self.requests[request_id].finished:
            raise ValueError(f"request {request_id} is not over")
        if len(tokens) + max_tokens > self.max_seq_len:
            raise ValueError(f"{len(tokens)} tokens and {max_tokens} more are over max_seq_len {self.max_seq_len}")
        extra = extra or {}
        request = LlmRequest(
            request_id,
            list(tokens),
            max_tokens,
            py_multimodal_data=extra.get("multimodal_data"),
            multimodal_input=extra.get("multimodal_input"),
            end_id=end_id,
        )
        self.requests[request_id] = request
        self.waiting.append(request)
        return request_id

    def _process(self, prompt: dict[str, Any], max_tokens: int, truncate: int | None) -> tuple[list[int], Any]:
        from tensorrt_llm.inputs import create_input_processor, create_input_processor_with_hash
        from tensorrt_llm.sampling_params import SamplingParams
        from transformers import AutoTokenizer

        if self.processor is None:
            self.processor = create_input_processor(str(self.folder), AutoTokenizer.from_pretrained(str(self.folder)))
            self.hashed = create_input_processor_with_hash(self.processor)
        sampling = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=truncate)
        if prompt.get("multi_modal_embeddings") is not None:
            return self.processor.attach_multimodal_embeddings(prompt, prompt["multi_modal_embeddings"], sampling)
        if prompt.get("multi_modal_data"):
            return self.hashed(prompt, sampling)
        return self.processor(prompt, sampling)

    def step(self, new_contexts: int | None = None) -> None:
        """One pass: `new_contexts` requests of the queue (by default as many as fit), and all that are generating."""
        generations = [request for request in self.running if not request.in_context]
        contexts = self._schedule(new_contexts, len(generations))
        for request in generations:
            self.kv_cache_manager.add_token(request.py_request_id)
        if not contexts and not generations:
            return
        logits = self.forward(contexts, generations)
        rows = [one for one, _ in contexts] + generations
        for request, chunk in contexts:
            request.context_current_position += chunk
        for row, request in enumerate(rows):
            if not request.in_context:
                self._take(request, int(logits[row].argmax()))

    def _schedule(self, new_contexts: int | None, generations: int) -> list[tuple[LlmRequest, int]]:
        contexts, room = [], self.settings.max_num_tokens - generations
        started = [request for request in self.running if request.in_context]
        limit = len(self.waiting) if new_contexts is None else new_contexts
        for request in started + self.waiting[:limit]:
            left = request.prompt_len - request.context_current_position
            chunk = left
            if left > room and self.features.chunked_prefill:
                chunk = room - room % self.kv_cache_manager.tokens_per_block
            if chunk > room or chunk <= 0 or len(contexts) + generations >= self.settings.max_batch_size:
                break
            if request not in self.running:
                self.kv_cache_manager.add_sequence(request.py_request_id, request.prompt_len)
                self.waiting.remove(request)
                self.running.append(request)
            contexts.append((request, chunk))
            room -= chunk
        return contexts

    def _take(self, request: LlmRequest, token: int) -> None:
        if self.settings.strip_after_prefill and request.py_multimodal_data:
            request.py_multimodal_data.clear()
        request.tokens.append(token)
        request.answer.append(token)
        if len(request.answer) >= request.max_new_tokens or token == request.end_id:
            self._end(request)

    def _end(self, request: LlmRequest) -> None:
        request.finished = True
        self.running.remove(request)
        self.kv_cache_manager.free_resources(request)

    def run(self) -> None:
        """Steps until every request is over.

        Raises:
            RuntimeError: those that wait do not fit.
        """
        while self.waiting or self.running:
            before = [(len(one.tokens), one.context_current_position) for one in self.requests.values()]
            self.step()
            if before == [(len(one.tokens), one.context_current_position) for one in self.requests.values()]:
                raise RuntimeError("no request can go on")

    def output(self, request_id: int) -> list[int]:
        """The tokens generated so far."""
        return list(self.requests[request_id].answer)

    def cancel(self, request_id: int) -> None:
        """End a request before its time."""
        request = self.requests[request_id]
        if request in self.waiting:
            self.waiting.remove(request)
            request.finished = True
        else:
            self._end(request)

    def preempt(self, request_id: int) -> None:
        """Take a request's blocks; it starts again from the queue, with what it has generated as part of its prompt."""
        request = self.requests[request_id]
        self.running.remove(request)
        self.kv_cache_manager.free_resources(request)
        request.pause()
        self.waiting.insert(0, request)
