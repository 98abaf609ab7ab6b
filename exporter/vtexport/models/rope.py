"""RoPE as tables, computed by transformers' own initialisers."""

from __future__ import annotations

from typing import Any

from vtexport.models.spec import ModelSpec


def rope_tables(spec: ModelSpec) -> tuple[Any, Any]:
    """The tables cos and sin, float32 [max_positions, head_size / 2]."""
    return tables(*rope_frequencies(spec), spec.decoder.max_positions)


def rope_frequencies(spec: ModelSpec) -> tuple[Any, float]:
    """The inverse frequencies, float32 [head_size / 2], and the factor on cosines and sines (yarn's; else 1)."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Llama, Mistral and Qwen2 share this embedding; only their config.json differs.
    text: Any = AutoConfig.for_model(**spec.config)
    rotary = LlamaRotaryEmbedding(text.text_config)
    return rotary.inv_freq, float(rotary.attention_scaling)


def tables(frequencies: Any, scaling: float, positions: int) -> tuple[Any, Any]:
    """The tables cos and sin of `frequencies` [D / 2], float32 [positions, D / 2], with the factor `scaling`."""
    import torch

    angle = torch.arange(positions, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
    return angle.cos() * scaling, angle.sin() * scaling
