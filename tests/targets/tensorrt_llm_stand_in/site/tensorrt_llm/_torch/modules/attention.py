"""The attention part of a layer."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ..attention_backend import AttentionMetadata
from ..attention_backend.interface import AttentionMask, PositionalEmbeddingParams, PredefinedAttentionMask
from ..attention_backend.utils import create_attention, get_attention_backend
from ..model_config import ModelConfig
from ..utils import get_model_extra_attrs, is_torch_compiling
from .linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from .rotary_embedding import RotaryEmbedding


class Attention(nn.Module):
    """Queries, keys and values in one product; positions; attention; a product."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        max_position_embeddings: int,
        bias: bool,
        pos_embd_params: PositionalEmbeddingParams | None = None,
        rope_fusion: bool | None = None,
        layer_idx: int | None = None,
        dtype: torch.dtype = None,
        dense_bias: bool | None = None,
        config: ModelConfig | None = None,
        q_scaling: float = 1.0,
        attention_chunk_size: int | None = None,
        disable_deep_gemm: bool = False,
        attn_output_gate: bool | None = None,
        use_custom_cublas_mm: bool = False,
        reduce_output: bool = True,
    ) -> None:
        super().__init__()
        if attn_output_gate:
            raise NotImplementedError("the stand-in has no gate after attention")
        self.layer_idx, self.layer_idx_str, self.register_to_config = layer_idx, str(layer_idx), False
        if config is not None:
            self._register(config)
        config = config or ModelConfig()
        self.hidden_size, self.num_heads, self.num_key_value_heads = (
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
        )
        own = getattr(config.pretrained_config, "head_dim", None)
        self.head_dim = own if isinstance(own, int) else hidden_size // num_attention_heads
        self.num_key_value_groups = num_attention_heads // num_key_value_heads
        self.max_position_embeddings, self.pos_embd_params = max_position_embeddings, pos_embd_params
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.attn_backend, self.quant_config = config.attn_backend, config.get_quant_config()
        self._make_products(config, bias, bias if dense_bias is None else dense_bias, dtype)
        fusable = get_attention_backend(self.attn_backend).support_fused_rope()
        self.rope_fusion = fusable if rope_fusion is None else rope_fusion and fusable
        self.rotary_emb = None
        if not self.rope_fusion and pos_embd_params is not None:
            self.rotary_emb = RotaryEmbedding(
                pos_embd_params.rope, head_dim=self.head_dim, is_neox=pos_embd_params.is_neox
            )
        self.attn = create_attention(
            self.attn_backend,
            layer_idx,
            self.num_heads,
            self.head_dim,
            self.num_key_value_heads,
            pos_embd_params=pos_embd_params if self.rope_fusion else None,
            quant_config=self.quant_config,
            q_scaling=q_scaling,
            attention_chunk_size=attention_chunk_size,
        )
        self.support_fused_qkv = self.attn.support_fused_qkv()

    def _make_products(self, config: ModelConfig, bias: bool, dense_bias: bool, dtype: torch.dtype) -> None:
        common: dict[str, Any] = {"dtype": dtype, "skip_create_weights_in_init": config.skip_create_weights_in_init}
        self.qkv_proj = Linear(
            self.hidden_size,
            self.q_size + 2 * self.kv_size,
            bias=bias,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
            **common,
        )
        self.o_proj = Linear(
            self.q_size,
            self.hidden_size,
            bias=dense_bias,
            tensor_parallel_mode=TensorParallelMode.ROW,
            **common,
        )

    def _register(self, config: ModelConfig) -> None:
        """Under torch.compile, layers are found by name: one with a number that is taken gets a suffix."""
        layers, suffix = config.extra_attrs.setdefault("attn_layers", {}), 0
        while self.layer_idx_str in layers:
            self.layer_idx_str = f"{self.layer_idx}_{suffix}"
            suffix += 1
        layers[self.layer_idx_str] = weakref.ref(self)
        self.register_to_config = True

    def create_weights(self) -> None:
        """Attention itself has none."""
        self.attn.update_quant_config(self.quant_config)
        self.o_proj.create_weights()

    def split_qkv(
        self, q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three tensors, whether they came as one or as three."""
        if k is None and v is None:
            q, k, v = q.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return q, k, v

    def convert_qkv(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the backend takes: one tensor."""
        if k is None and v is None and not self.support_fused_qkv:
            return self.split_qkv(q)
        if k is not None and v is not None and self.support_fused_qkv:
            return torch.concat([q, k, v], dim=-1), None, None
        return q, k, v

    def apply_rope(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rotate queries and keys, unless the backend does."""
        if not self.rope_fusion and position_ids is not None:
            q, k, v = self.split_qkv(q, k, v)
            q, k = self.rotary_emb(position_ids, [q, k])
        return q, k, v

    def forward_impl(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attn_metadata: AttentionMetadata,
        attention_mask: AttentionMask,
        attention_window_size: int | None,
        attention_mask_data: torch.Tensor | None,
        mrope_config: dict | None,
        attention_sinks: torch.Tensor | None = None,
        has_lora: bool = False,
    ) -> torch.Tensor:
        """Attention by `attn_metadata`; under torch.compile, by the engine's metadata whatever was passed."""
        if self.register_to_config and is_torch_compiling():
            attn_metadata = get_model_extra_attrs()["attention_metadata"]()
        rows = attn_metadata.num_tokens
        return self.attn.forward(
            q[:rows],
            None if k is None else k[:rows],
            None if v is None else v[:rows],
            attn_metadata,
            attention_mask=attention_mask,
            mrope_config=mrope_config,
            attention_window_size=attention_window_size,
            attention_mask_data=attention_mask_data,
            attention_sinks=attention_sinks,
        )

    def forward(
        self,
        position_ids: torch.IntTensor | None,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        attention_mask: AttentionMask = PredefinedAttentionMask.CAUSAL,
        mrope_config: dict | None = None,
        all_reduce_params: Any = None,
        lora_params: dict | None = None,
        attention_window_size: int | None = None,
        attention_mask_data: torch.Tensor | None = None,
        attention_sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of `hidden_states`, `[tokens, hidden_size]`."""
        q, k, v = self.apply_rope(self.qkv_proj(hidden_states), None, None, position_ids)
        q, k, v = self.convert_qkv(q, k, v)
        answer = self.forward_impl(
            q,
            k,
            v,
            attn_metadata,
            attention_mask,
            attention_window_size,
            attention_mask_data,
            mrope_config=mrope_config,
            attention_sinks=attention_sinks,
        )
        return self.o_proj(answer, all_reduce_params=all_reduce_params)
