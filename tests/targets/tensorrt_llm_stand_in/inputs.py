"""From scheduled requests to a model's inputs, in the way of TensorRT-LLM's engine."""

from __future__ import annotations

from typing import Any

import torch

from tests.targets.tensorrt_llm_stand_in.requests import LlmRequest


class Inputs:
    """The engine's buffers. What they held before stays where nothing new is written."""

    def __init__(self, model: Any, max_num_tokens: int, max_beam_width: int) -> None:
        self.model, self.max_beam_width = model, max_beam_width
        self.input_ids_cuda = torch.ones(max_num_tokens, dtype=torch.int)
        self.position_ids_cuda = torch.zeros(max_num_tokens, dtype=torch.int)

    def prepare(
        self, contexts: list[tuple[LlmRequest, int]], generations: list[LlmRequest], metadata: Any
    ) -> dict[str, Any]:
        """Fill buffers and `metadata` for prompts, each with the tokens of this pass, and then generations.

        Returns:
            the arguments of the model's `forward`.
        """
        from tensorrt_llm._torch.metadata import KVCacheParams

        ids: list[int] = []
        positions: list[int] = []
        lengths, prompts, cached, visual = [], [], [], []
        for request, chunk in contexts:
            begin = request.context_current_position
            tokens = request.get_tokens(0)[begin : begin + chunk]
            ids += tokens
            positions += range(begin, begin + chunk)
            lengths.append(chunk)
            prompts.append(chunk)
            cached.append(begin)
            visual += self._multimodal(request, begin, chunk)
        indices = self._visual(ids) if visual else None
        for request in generations:
            if not request.is_cuda_graph_dummy:
                ids.append(request.get_last_tokens(0))
            past = request.max_beam_num_tokens - 1
            positions.append(past)
            lengths.append(1)
            prompts.append(request.py_prompt_len)
            cached.append(past)
        count = len(positions)
        assert count <= len(self.position_ids_cuda), "too many tokens"
        self.input_ids_cuda[: len(ids)] = torch.tensor(ids, dtype=torch.int)
        self.position_ids_cuda[:count] = torch.tensor(positions, dtype=torch.int)
        if not metadata.is_cuda_graph:
            metadata.seq_lens = torch.tensor(lengths, dtype=torch.int)
        metadata.beam_width = self.max_beam_width if generations else 1
        metadata.request_ids = [request.py_request_id for request in [one for one, _ in contexts] + generations]
        metadata.prompt_lens = prompts
        metadata.num_contexts = len(contexts)
        metadata.num_chunked_ctx_requests = 0
        metadata.kv_cache_params = KVCacheParams(
            use_cache=True, num_cached_tokens_per_seq=cached, num_extra_kv_tokens=0
        )
        metadata.prepare()
        made = {
            "attn_metadata": metadata,
            "input_ids": self.input_ids_cuda[:count],
            "position_ids": self.position_ids_cuda[:count].unsqueeze(0),
            "inputs_embeds": None,
            "multimodal_params": visual,
        }
        if indices is not None:
            mask = torch.ones(count, dtype=torch.bool)
            mask[indices] = False
            made |= {"mm_token_indices": indices, "text_token_indices": torch.where(mask)[0]}
        return made

    def _multimodal(self, request: LlmRequest, begin: int, chunk: int) -> list[Any]:
        from tensorrt_llm.inputs.multimodal import MultimodalParams, MultimodalRuntimeData

        runtime = None
        if request.multimodal_input is not None:
            runtime = MultimodalRuntimeData(
                mm_token_lengths=request.multimodal_input.multimodal_lengths,
                mm_token_positions=request.multimodal_input.multimodal_positions,
                past_seen_token_num=begin,
                chunk_end_pos=begin + chunk,
                special_token_offsets=request.py_multimodal_data.get("special_token_offsets", []),
            )
        params = MultimodalParams(multimodal_data=request.py_multimodal_data, multimodal_runtime=runtime)
        if not params.has_content():
            return []
        paths = getattr(self.model, "multimodal_data_device_paths", None)
        params.to_device("multimodal_data", "cuda", pin_memory=True, target_keywords=paths)
        request.py_multimodal_data = params.multimodal_data
        return [params]

    def _visual(self, ids: list[int]) -> torch.Tensor:
        """Places of visual tokens among those of prompts: by the model's ids of them, or past its vocabulary."""
        from tensorrt_llm._torch.models.modeling_multimodal_utils import filter_mm_token_from_input_ids

        vocabulary = self.model.config.vocab_size
        known = getattr(self.model, "mm_token_ids", None)
        return filter_mm_token_from_input_ids(torch.tensor(ids, dtype=torch.int), vocabulary, known)[1]
