"""RoPE as tables, computed by transformers' own initialisers."""

from __future__ import annotations

from typing import Any

from vtexport.models.spec import ModelSpec


def rope_tables(spec: ModelSpec) -> tuple[Any, Any]:
    """The tables cos and sin, float32 [max_positions, head_size / 2].

    Attention scaling (yarn) is folded into both tables, as in transformers' rotary embedding.
    """
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Llama, Mistral and Qwen2 share this embedding; only their config.json differs.
    text: Any = AutoConfig.for_model(**spec.config)
    rotary = LlamaRotaryEmbedding(text.text_config)
    position = torch.arange(spec.decoder.max_positions)[None]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), position)
    half = spec.decoder.head_size // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
