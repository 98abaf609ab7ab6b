"""A server on one device: requests in, tokens out, in the way of TensorRT-LLM's executor and engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from tests.targets.tensorrt_llm_stand_in.inputs import Inputs
from tests.targets.tensorrt_llm_stand_in.loading import load_model, model_config
from tests.targets.tensorrt_llm_stand_in.requests import LlmRequest
from tests.targets.tensorrt_llm_stand_in.runner import Runner, dummy_requests


class Server:
    """Serves one checkpoint while the stand-in is installed.

    Args:
        folder: the checkpoint.
        max_batch_size: sequences of a pass.
        max_num_tokens: tokens of a pass.
        max_seq_len: tokens of a sequence; at most what the model infers, which is the default.
        tokens_per_block: of the cache.
        cuda_graphs: passes of generations alone are recorded, at first for every size of batch with dummy requests.
        enable_block_reuse: what the metadata says; no request has a prefix of another's here.
        enable_chunked_prefill: prompts are cut where a pass is full.
        max_beam_width: what the metadata is made for.
        tensor_parallel: what the mapping says; there is one process.
        pipeline_parallel: as above.
        spec_config: what the model is told.
        torch_compile: attention takes the engine's metadata, whatever the model passes.
        warmup: passes with dummy requests before the first real one.
        strip_after_prefill: images are forgotten once a prompt is computed, as from TensorRT-LLM 1.3 on.
        quant_config: what the model is told.
        blocks: of the cache; by default enough for all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_batch_size: int = 8,
        max_num_tokens: int = 8192,
        max_seq_len: int | None = None,
        tokens_per_block: int = 8,
        cuda_graphs: bool = False,
        enable_block_reuse: bool = False,
        enable_chunked_prefill: bool = False,
        max_beam_width: int = 1,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        spec_config: Any = None,
        torch_compile: bool = False,
        warmup: bool = True,
        strip_after_prefill: bool = False,
        quant_config: Any = None,
        blocks: int | None = None,
    ) -> None:
        from tensorrt_llm._torch.attention_backend.interface import AttentionRuntimeFeatures
        from tensorrt_llm._torch.utils import set_torch_compiling
        from tensorrt_llm.mapping import Mapping

        self.folder = Path(folder)
        self.max_batch_size, self.max_num_tokens, self.max_beam_width = max_batch_size, max_num_tokens, max_beam_width
        self.strip_after_prefill = strip_after_prefill
        world = tensor_parallel * pipeline_parallel
        self.mapping = Mapping(world_size=world, tp_size=tensor_parallel, pp_size=pipeline_parallel)
        settings: dict[str, Any] = {} if quant_config is None else {"quant_config": quant_config}
        config = model_config(
            self.folder,
            mapping=self.mapping,
            spec_config=spec_config,
            max_num_tokens=max_num_tokens,
            max_seq_len=max_seq_len,
            use_cuda_graph=cuda_graphs,
            **settings,
        )
        self.features = AttentionRuntimeFeatures(
            chunked_prefill=enable_chunked_prefill,
            cache_reuse=enable_block_reuse,
            has_speculative_draft_tokens=spec_config is not None,
        )
        self.model = load_model(self.folder, config)
        set_torch_compiling(torch_compile)
        longest = self.model.infer_max_seq_len()
        self.max_seq_len = longest if max_seq_len is None else min(max_seq_len, longest)
        self._make_cache(tokens_per_block, blocks)
        self.inputs = Inputs(self.model, max_num_tokens)
        self.runner = Runner(max_batch_size) if cuda_graphs else None
        self.attn_metadata: Any = None
        self.processor: Any = None
        self.requests: dict[int, LlmRequest] = {}
        self.waiting: list[LlmRequest] = []
        self.running: list[LlmRequest] = []
        self.next_id = 1
        if warmup:
            self._warm_up()

    def _make_cache(self, tokens_per_block: int, blocks: int | None) -> None:
        from tensorrt_llm._torch.pyexecutor.resource_manager import KVCacheManager

        # As TensorRT-LLM does: the decoder's configuration has to be the model's by now.
        config = self.model.model_config.pretrained_config
        head = getattr(config, "head_dim", None)
        self.kv_cache_manager = KVCacheManager(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
            head_dim=head if isinstance(head, int) else config.hidden_size // config.num_attention_heads,
            tokens_per_block=tokens_per_block,
            max_seq_len=self.max_seq_len,
            max_batch_size=self.max_batch_size,
            dtype=self.model.model_config.torch_dtype,
            blocks=blocks,
        )

    def _warm_up(self) -> None:
        """A prompt of dummy tokens, then every size of recorded pass, the longest sequence first; none is real."""
        manager = self.kv_cache_manager
        (prompt,) = dummy_requests(manager, [0], [min(5, self.max_num_tokens)], generation=False)
        self._forward([(prompt, prompt.prompt_len)], [])
        manager.free_resources(prompt)
        for size in reversed(self.runner.sizes if self.runner else []):
            longest = min(self.max_seq_len - 1, (len(manager.free) - size) * manager.tokens_per_block)
            ids = [size - 1, *range(size - 1)]
            made = dummy_requests(manager, ids, [longest] + [1] * (size - 1), generation=True)
            self._forward([], made)
            for request in made:
                manager.free_resources(request)

    def _set_up_attn_metadata(self) -> Any:
        """Made once, of the class that attention names at that moment."""
        from tensorrt_llm._torch.attention_backend import TrtllmAttentionMetadata
        from tensorrt_llm._torch.attention_backend.utils import get_attention_backend

        backend = get_attention_backend(self.model.model_config.attn_backend)
        if self.attn_metadata is None:
            beams = (self.max_batch_size, self.max_beam_width, self.max_seq_len)
            indirection = torch.zeros(beams, dtype=torch.int32) if self.max_beam_width > 1 else None
            config = self.model.model_config.pretrained_config
            self.attn_metadata = backend.Metadata(
                max_num_requests=self.max_batch_size,
                max_num_tokens=self.max_num_tokens,
                max_num_sequences=self.max_batch_size * self.max_beam_width,
                kv_cache_manager=self.kv_cache_manager,
                mapping=self.mapping,
                runtime_features=self.features,
                enable_flash_mla=self.model.model_config.enable_flash_mla,
                enable_context_mla_with_cached_kv=False,
                # TensorRT-LLM compares the classes: a subclass gets none.
                cache_indirection=indirection if backend.Metadata is TrtllmAttentionMetadata else None,
                sparse_attention_config=None,
                num_heads_per_kv=config.num_attention_heads // getattr(config, "num_key_value_heads", 1),
            )
        return self.attn_metadata

    @torch.inference_mode()
    def _forward(self, contexts: list[tuple[LlmRequest, int]], generations: list[LlmRequest]) -> torch.Tensor:
        """One pass: logits of each sequence, prompts first."""
        from tensorrt_llm._torch.utils import model_extra_attrs

        with model_extra_attrs(self.model.extra_attrs):
            metadata = self._set_up_attn_metadata()
            recorded = self.runner is not None and not contexts
            if recorded:
                generations = generations + self.runner.padding(len(generations), self.kv_cache_manager)
                recorded = len(generations) in self.runner.sizes
            if recorded:
                metadata = self.runner.metadata_for(len(generations), metadata)
            inputs = self.inputs.prepare(contexts, generations, metadata)
            outputs = self.runner.run(inputs, self._model_forward) if recorded else self._model_forward(inputs)
        return outputs["logits"] if isinstance(outputs, dict) else outputs

    def _model_forward(self, inputs: dict[str, Any]) -> Any:
        from tensorrt_llm._torch.utils import get_model_extra_attrs

        attributes = get_model_extra_attrs()
        attributes["attention_metadata"] = weakref.ref(inputs["attn_metadata"])
        attributes.update(self.model.model_config.extra_attrs)
        return self.model.forward(**inputs, return_context_logits=False)

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
        logits = self._forward(contexts, generations)
        rows = [one for one, _ in contexts] + generations
        for request, chunk in contexts:
            request.context_current_position += chunk
        for row, request in enumerate(rows):
            if not request.in_context:
                self._take(request, int(logits[row].argmax()))

    def _schedule(self, new_contexts: int | None, generations: int) -> list[tuple[LlmRequest, int]]:
        contexts, room = [], self.max_num_tokens - generations
        started = [request for request in self.running if request.in_context]
        limit = len(self.waiting) if new_contexts is None else new_contexts
        for request in started + self.waiting[:limit]:
            left = request.prompt_len - request.context_current_position
            chunk = left
            if left > room and self.features.chunked_prefill:
                chunk = room - room % self.kv_cache_manager.tokens_per_block
            if chunk > room or chunk <= 0 or len(contexts) + generations >= self.max_batch_size:
                break
            if request not in self.running:
                self.kv_cache_manager.add_sequence(request.py_request_id, request.prompt_len)
                self.waiting.remove(request)
                self.running.append(request)
            contexts.append((request, chunk))
            room -= chunk
        return contexts

    def _take(self, request: LlmRequest, token: int) -> None:
        if self.strip_after_prefill and request.py_multimodal_data:
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
