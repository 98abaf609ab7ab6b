"""The metadata of a pass, and what a backend of attention is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Generic, TypeVar

import torch

from ...functional import PositionEmbeddingType
from ...mapping import Mapping
from ..metadata import KVCacheParams
from .rope import RopeParams

__all__ = ["KVCacheParams", "RopeParams"]


@dataclass
class AttentionRuntimeFeatures:
    """What the server does that attention must know of."""

    chunked_prefill: bool = False
    cache_reuse: bool = False
    has_speculative_draft_tokens: bool = False
    chunk_size: int = 0
    chunked_prefill_buffer_batch_size: int = 4


class AttentionInputType(IntEnum):
    """Which requests a call has."""

    mixed = 0
    context_only = 1
    generation_only = 2


@dataclass(kw_only=True)
class AttentionMetadata:
    """Lengths and requests of one pass; made once, filled anew for every pass."""

    max_num_requests: int
    max_num_tokens: int
    max_num_sequences: int | None = None
    kv_cache_manager: Any
    mapping: Mapping | None = None
    enable_flash_mla: bool = False
    enable_context_mla_with_cached_kv: bool = False
    is_cuda_graph: bool = field(default=False, repr=False)
    # These three are properties; without a value, the dataclass sets them to the property itself.
    seq_lens: torch.Tensor | None
    num_contexts: int
    position_ids: torch.Tensor | None = None
    _num_contexts: int = field(init=False, default=0, repr=False)
    kv_cache_params: KVCacheParams | None = None
    seq_lens_kv: torch.Tensor | None
    _seq_lens: torch.Tensor | None = field(init=False, repr=False, default=None)
    _seq_lens_kv: torch.Tensor | None = field(init=False, repr=False, default=None)
    _seq_lens_cuda: torch.Tensor | None = field(init=False, repr=False, default=None)
    _seq_lens_kv_cuda: torch.Tensor | None = field(init=False, repr=False, default=None)
    cross: AttentionMetadata | None = None
    request_ids: list[int] | None = None
    prompt_lens: list[int] | None = None
    runtime_features: AttentionRuntimeFeatures = field(default_factory=AttentionRuntimeFeatures)
    all_rank_num_tokens: list[int] | None = None
    _num_generations: int = field(init=False, default=0, repr=False)
    _num_ctx_tokens: int = field(init=False, default=0, repr=False)
    _num_tokens: int = field(init=False, default=0, repr=False)
    padded_num_tokens: int | None = None
    cache_indirection: torch.Tensor | None = None
    cuda_graph_buffers: Any = None
    _saved_tensors: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    sparse_attention_config: Any = None
    num_heads_per_kv: int | None = 1

    def __post_init__(self) -> None:
        """There is no cross attention here."""
        if self.is_cross or self.cross is not None:
            raise NotImplementedError("the stand-in has no cross attention")

    def on_update(self) -> None:
        """Count tokens and sequences."""
        lengths = self._seq_lens
        if lengths is not None and 0 <= self.num_contexts <= lengths.shape[0]:
            self._num_ctx_tokens = int(lengths[: self.num_contexts].sum())
            self._num_generations = lengths.shape[0] - self.num_contexts
        counted = lengths if self._seq_lens_kv is None else self._seq_lens_kv
        if counted is not None:
            self._num_tokens = int(counted.sum())

    def on_update_kv_lens(self) -> None:
        """What speculative decoding calls after it has changed lengths."""

    @property
    def seq_lens(self) -> torch.Tensor | None:
        """How many tokens of each sequence the pass computes, on the host."""
        return self._seq_lens

    @seq_lens.setter
    def seq_lens(self, value: torch.Tensor | None) -> None:
        self._seq_lens = value if value is not AttentionMetadata.seq_lens else None
        self.on_update()
        if self._seq_lens is not None:
            if self.is_cuda_graph and self._seq_lens_cuda is not None:
                self._seq_lens_cuda.copy_(self._seq_lens)
            else:
                # A new tensor, as a copy to a GPU is.
                self._seq_lens_cuda = self._seq_lens.clone()

    @property
    def num_contexts(self) -> int:
        """How many sequences are prompts; they come first."""
        return self._num_contexts

    @num_contexts.setter
    def num_contexts(self, value: int) -> None:
        self._num_contexts = value if value is not AttentionMetadata.num_contexts else 0
        self.on_update()

    @property
    def num_generations(self) -> int:
        """How many sequences add one token."""
        return self._num_generations

    @num_generations.setter
    def num_generations(self, value: int) -> None:
        self._num_generations = value if value is not AttentionMetadata.num_generations else 0
        self.on_update()

    @property
    def seq_lens_cuda(self) -> torch.Tensor | None:
        """`seq_lens` on the GPU."""
        return self._seq_lens_cuda

    @property
    def seq_lens_kv(self) -> torch.Tensor | None:
        """`seq_lens`, but for cross attention."""
        return self._seq_lens_kv if self._seq_lens_kv is not None else self._seq_lens

    @seq_lens_kv.setter
    def seq_lens_kv(self, value: torch.Tensor | None) -> None:
        self._seq_lens_kv = value if value is not AttentionMetadata.seq_lens_kv else None
        self.on_update()
        if self._seq_lens_kv is not None:
            self._seq_lens_kv_cuda = self._seq_lens_kv.clone()

    @property
    def seq_lens_kv_cuda(self) -> torch.Tensor | None:
        """`seq_lens_kv` on the GPU."""
        return self._seq_lens_kv_cuda if self._seq_lens_kv_cuda is not None else self._seq_lens_cuda

    @property
    def context_lens(self) -> torch.Tensor:
        """Tokens of each prompt."""
        return self.seq_lens[: self.num_contexts]

    @property
    def num_seqs(self) -> int:
        """How many sequences there are."""
        return self.seq_lens.shape[0]

    @property
    def is_cross(self) -> bool:
        """Whether keys have lengths of their own."""
        return self.seq_lens is not self.seq_lens_kv

    @property
    def has_cross_sub_metadata(self) -> bool:
        """Whether there is metadata for cross attention too."""
        return self.cross is not None and self.cross is not self

    @property
    def num_ctx_tokens(self) -> int:
        """Tokens of all prompts."""
        return self._num_ctx_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self._num_tokens

    def prepare(self) -> None:
        """Called before every pass, after the fields are set."""

    def create_cuda_graph_metadata(
        self,
        max_batch_size: int,
        sub_cross_metadata: bool = False,
        max_draft_tokens: int = 0,
        buffers: Any = None,
    ) -> AttentionMetadata:
        """A shallow copy for graphs of `max_batch_size` sequences, with buffers of its own or from `buffers`."""
        if self.is_cuda_graph:
            return self
        made = copy.copy(self)
        made.is_cuda_graph = True
        made.cuda_graph_buffers = buffers
        made._seq_lens_cuda = None
        made.seq_lens = torch.ones(max_batch_size, dtype=torch.int) * (1 + max_draft_tokens)
        made.num_contexts = 0
        made.__post_init__()
        return made

    @staticmethod
    def get_empty(
        buffers: Any,
        tensor_shape: list[int],
        dtype: torch.dtype,
        cache_name: str,
        capture_graph: bool = False,
    ) -> torch.Tensor:
        """A tensor of zeros; from `buffers`, by name, if there are any: two who ask for one name share its memory."""
        if buffers is None:
            return torch.zeros(tuple(tensor_shape), dtype=dtype)
        return buffers.get_buffer(tensor_shape, dtype, cache_name, capture_graph)

    @staticmethod
    def get_empty_like(
        buffers: Any, like_tensor: torch.Tensor, cache_name: str, capture_graph: bool = False
    ) -> torch.Tensor:
        """`get_empty` with a tensor's shape and dtype."""
        return AttentionMetadata.get_empty(
            buffers, like_tensor.shape, dtype=like_tensor.dtype, cache_name=cache_name, capture_graph=capture_graph
        )


@dataclass(kw_only=True, frozen=True)
class PositionalEmbeddingParams:
    """How positions enter attention."""

    type: PositionEmbeddingType
    embedder: Any = None
    rope: RopeParams | None = None
    is_neox: bool = True
    mrope_section: list[int] | None = None
    mrope_interleaved: bool = False

    def __post_init__(self) -> None:
        """Rotary positions need parameters, and no one else's embedder."""
        if self.type.is_deferred() != (self.embedder is not None):
            raise AssertionError(f"{self.type} and an embedder")
        if self.type.is_rope() and self.rope is None:
            raise AssertionError(f"{self.type} needs rope")


class PredefinedAttentionMask(StrEnum):
    """Which keys a query sees."""

    CAUSAL = "causal"
    FULL = "full"


AttentionMask = PredefinedAttentionMask
TMetadata = TypeVar("TMetadata", bound=AttentionMetadata)


class AttentionBackend(Generic[TMetadata]):
    """Attention of one layer. `Metadata` is the class that the engine makes its metadata of."""

    Metadata: type[AttentionMetadata] = AttentionMetadata

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        quant_config: Any = None,
        skip_create_weights_in_init: bool = False,
        sparse_attention_config: Any = None,
        **kwargs: Any,
    ) -> None:
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, num_heads, head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.quant_config = quant_config

    def update_quant_config(self, new_quant_config: Any) -> None:
        """Quantise otherwise."""
        self.quant_config = new_quant_config
