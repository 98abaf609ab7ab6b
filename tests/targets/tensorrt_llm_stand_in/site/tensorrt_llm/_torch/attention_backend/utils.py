"""Attention by the name of its backend."""

from __future__ import annotations

from typing import Any

from .trtllm import TrtllmAttention


def get_attention_backend(backend_name: str, sparse_attn_config: Any = None) -> type[TrtllmAttention]:
    """The class of a backend.

    Raises:
        NotImplementedError: it is not TRTLLM.
    """
    if backend_name != "TRTLLM" or sparse_attn_config is not None:
        raise NotImplementedError(f"the stand-in has no backend {backend_name}")
    return TrtllmAttention


def create_attention(
    backend_name: str,
    layer_idx: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    pos_embd_params: Any = None,
    quant_config: Any = None,
    q_scaling: float | None = None,
    skip_create_weights_in_init: bool = False,
    attention_chunk_size: int | None = None,
    sparse_attention_config: Any = None,
) -> TrtllmAttention:
    """Attention of one layer."""
    return get_attention_backend(backend_name, sparse_attention_config)(
        layer_idx,
        num_heads,
        head_dim,
        num_kv_heads,
        quant_config=quant_config,
        q_scaling=q_scaling,
        pos_embd_params=pos_embd_params,
        skip_create_weights_in_init=skip_create_weights_in_init,
        attention_chunk_size=attention_chunk_size,
    )
