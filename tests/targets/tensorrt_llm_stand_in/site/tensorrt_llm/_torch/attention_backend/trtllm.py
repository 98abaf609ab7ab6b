"""The backend TRTLLM and its metadata. Names that end in `_cuda` are tensors on the GPU there, and on the CPU here."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..metadata import KVCacheParams
from ..utils import get_global_attrs, get_model_extra_attrs
from .interface import (
    AttentionBackend,
    AttentionInputType,
    AttentionMask,
    AttentionMetadata,
    PositionalEmbeddingParams,
    PredefinedAttentionMask,
)
from .paged import paged_attention


@dataclass(kw_only=True)
class TrtllmAttentionMetadata(AttentionMetadata):
    """The buffers that kernels read, and how they are filled."""

    workspace: torch.Tensor | None = None
    cuda_graph_workspace: torch.Tensor | None = None
    beam_width: int = 1
    max_seq_len: int | None
    _max_seq_len_storage: int | None = field(default=None, init=True, repr=False)
    is_spec_decoding_enabled: bool = False
    use_spec_decoding: bool = False
    is_spec_dec_tree: bool = False
    is_spec_dec_dynamic_tree: bool = False
    spec_decoding_position_offsets: torch.Tensor | None = None
    spec_decoding_packed_mask: torch.Tensor | None = None
    spec_decoding_generation_lengths: torch.Tensor | None = None
    spec_decoding_bl_tree_mask_offset: torch.Tensor | None = None
    spec_decoding_bl_tree_mask: torch.Tensor | None = None
    spec_bl_tree_first_sparse_mask_offset_kv: torch.Tensor | None = None
    enable_helix: bool = False
    helix_position_offsets: torch.Tensor | None = None
    helix_position_offsets_cpu: torch.Tensor | None = None
    helix_is_inactive_rank: torch.Tensor | None = None
    helix_is_inactive_rank_cpu: torch.Tensor | None = None

    @property
    def max_seq_len(self) -> int:
        """The cache manager's, or what was set where there is no cache."""
        return self._max_seq_len_storage if self.kv_cache_manager is None else self.kv_cache_manager.max_seq_len

    @max_seq_len.setter
    def max_seq_len(self, value: int) -> None:
        self._max_seq_len_storage = value

    @property
    def tokens_per_block(self) -> int | None:
        """The cache manager's."""
        return None if self.kv_cache_manager is None else self.kv_cache_manager.tokens_per_block

    @property
    def host_kv_cache_pool_pointers(self) -> torch.Tensor | None:
        """The cache manager's."""
        return None if self.kv_cache_manager is None else self.kv_cache_manager.kv_cache_pool_pointers

    @property
    def host_kv_cache_pool_mapping(self) -> torch.Tensor | None:
        """The cache manager's."""
        return None if self.kv_cache_manager is None else self.kv_cache_manager.kv_cache_pool_mapping

    def __post_init__(self) -> None:
        """Make the buffers: of the object's own, or from `cuda_graph_buffers`, where a name is one buffer for all."""
        super().__post_init__()
        self._post_init_with_buffers(self.cuda_graph_buffers)

    def _post_init_with_buffers(self, buffers: Any) -> None:
        if self.max_num_sequences is None:
            self.max_num_sequences = self.max_num_requests
        capture = self.is_cuda_graph
        count = (self.max_num_sequences,)
        self.prompt_lens_cuda = self.get_empty(buffers, count, torch.int, "prompt_lens_cuda", capture)
        self.kv_lens_cuda = self.get_empty_like(buffers, self.prompt_lens_cuda, "kv_lens_cuda", capture)
        self.prompt_lens_cpu = torch.zeros(count, dtype=torch.int)
        self.kv_lens = torch.zeros(count, dtype=torch.int)
        self.host_total_kv_lens = torch.zeros(2, dtype=torch.int)
        self.host_request_types = torch.zeros(count, dtype=torch.int)
        if self.workspace is None:
            self.workspace = torch.empty(0, dtype=torch.int8)
        if self.cuda_graph_workspace is None:
            self.cuda_graph_workspace = torch.empty(0, dtype=torch.int8)
        self.block_ids_per_seq = self.kv_block_ids_per_seq = None
        if self.kv_cache_manager is not None:
            manager = self.kv_cache_manager
            shape = [manager.num_pools, self.max_num_sequences, 2, manager.max_blocks_per_seq]
            self.kv_cache_block_offsets = self.get_empty(buffers, shape, torch.int32, "kv_cache_block_offsets", capture)

    def prepare(self) -> None:
        """Fill the buffers from the fields that the engine has set."""
        if get_model_extra_attrs() is None:
            get_global_attrs().attention_metadata = weakref.ref(self)
        if self.kv_cache_manager is None:
            self.kv_cache_params = KVCacheParams(use_cache=False)
            self.prompt_lens = self.context_lens
            self.kv_cache_block_offsets = None
        count, contexts = self.num_seqs, self.num_contexts
        self.prompt_lens_cpu[:count].copy_(torch.as_tensor(self.prompt_lens, dtype=torch.int))
        self.prompt_lens_cuda[:count].copy_(self.prompt_lens_cpu[:count])
        lengths = self.seq_lens_kv
        if self.kv_cache_params.use_cache:
            lengths = torch.tensor(self.kv_cache_params.num_cached_tokens_per_seq, dtype=torch.int) + lengths
        self.kv_lens[:count].copy_(lengths + self.kv_cache_params.num_extra_kv_tokens)
        self.kv_lens_cuda[:count].copy_(lengths)
        self.host_total_kv_lens[0] = lengths[:contexts].sum()
        self.host_total_kv_lens[1] = lengths[contexts:count].sum()
        self.host_request_types[:contexts] = 0
        self.host_request_types[contexts:count] = 1
        assert self.request_ids is not None
        if self.kv_cache_manager is not None:
            self.kv_cache_manager.copy_batch_block_offsets(
                self.kv_cache_block_offsets, self.request_ids, self.beam_width, contexts, count
            )
            longest = int(self.kv_lens[:count].max())
            assert longest <= self.kv_cache_manager.max_seq_len, f"a sequence of {longest} tokens is too long"
        self.kv_lens_cuda_runtime = self.kv_lens_cuda[:count]
        self.kv_lens_runtime = lengths[:count]
        self.prompt_lens_cuda_runtime = self.prompt_lens_cuda[:count]
        self.prompt_lens_cpu_runtime = self.prompt_lens_cpu[:count]
        self.host_request_types_runtime = self.host_request_types[:count]

    def update_spec_dec_param(self, *args: Any, **kwargs: Any) -> None:
        """There is no speculative decoding here."""
        raise NotImplementedError("the stand-in has no speculative decoding")


class TrtllmAttention(AttentionBackend[TrtllmAttentionMetadata]):
    """Attention of one layer over the paged cache."""

    Metadata = TrtllmAttentionMetadata

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        quant_config: Any = None,
        q_scaling: float | None = None,
        pos_embd_params: PositionalEmbeddingParams | None = None,
        mla_params: Any = None,
        skip_create_weights_in_init: bool = False,
        attention_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if mla_params is not None or attention_chunk_size is not None:
            raise NotImplementedError("the stand-in has neither latent nor chunked attention")
        super().__init__(layer_idx, num_heads, head_dim, num_kv_heads, quant_config)
        self.scale = 1 / (math.sqrt(head_dim) * (q_scaling or 1.0))
        self.frequencies = None
        if pos_embd_params is not None:
            if not pos_embd_params.is_neox or pos_embd_params.rope.dim != head_dim:
                raise NotImplementedError("the stand-in rotates whole heads, by halves")
            self.frequencies = pos_embd_params.rope.frequencies()

    def get_local_layer_idx(self, metadata: TrtllmAttentionMetadata) -> int:
        """This layer's place in the cache."""
        return metadata.kv_cache_manager.layer_offsets[self.layer_idx]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        metadata: TrtllmAttentionMetadata,
        output: torch.Tensor | None = None,
        output_sf: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
        out_scale_sf: torch.Tensor | None = None,
        kv_scales_sf: torch.Tensor | None = None,
        kv_scales_sf_inv: torch.Tensor | None = None,
        *,
        attention_mask: AttentionMask = PredefinedAttentionMask.CAUSAL,
        attention_input_type: AttentionInputType = AttentionInputType.mixed,
        latent_cache: torch.Tensor | None = None,
        q_pe: torch.Tensor | None = None,
        mrope_config: dict | None = None,
        attention_window_size: int | None = None,
        softmax_stats_tensor: torch.Tensor | None = None,
        enable_attn_nvfp4_output: bool = True,
        attention_sinks: torch.Tensor | None = None,
        chunked_prefill_buffer_batch_size: int = 1,
        cu_q_seqlens: torch.Tensor | None = None,
        cu_kv_seqlens: torch.Tensor | None = None,
        fmha_scheduler_counter: torch.Tensor | None = None,
        mla_bmm1_scale: torch.Tensor | None = None,
        mla_bmm2_scale: torch.Tensor | None = None,
        quant_q_buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend with `q`, which has keys and values too, by the lengths and blocks of `metadata`."""
        assert isinstance(metadata, TrtllmAttentionMetadata)
        assert not metadata.is_cross
        if k is not None or v is not None or metadata.kv_cache_manager is None or metadata.beam_width != 1:
            raise NotImplementedError("the stand-in has fused qkv, a cache and no beams")
        if attention_window_size is not None or mrope_config or attention_sinks is not None:
            raise NotImplementedError("the stand-in has neither windows nor other additions to attention")
        layer = self.get_local_layer_idx(metadata)
        result = paged_attention(
            q,
            metadata.kv_cache_manager.get_buffers(layer),
            metadata.kv_cache_block_offsets[0],
            metadata.kv_lens_cuda_runtime,
            metadata.prompt_lens_cuda_runtime,
            metadata.kv_lens_runtime,
            metadata.prompt_lens_cpu_runtime,
            metadata.host_request_types_runtime,
            metadata.host_total_kv_lens,
            metadata.is_cuda_graph,
            self.frequencies,
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            attention_mask == PredefinedAttentionMask.CAUSAL,
        )
        return result if output is None else output.copy_(result)

    def create_output(self, q: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
        """A tensor for the answer to `q`."""
        return [q.new_empty(q.shape[0], self.num_heads * self.head_dim)]

    @classmethod
    def support_fused_rope(cls) -> bool:
        """It can rotate queries and keys itself."""
        return True

    @classmethod
    def support_fused_qkv(cls) -> bool:
        """It takes queries, keys and values in one tensor."""
        return True
