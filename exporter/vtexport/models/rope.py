"""RoPE as tables, computed by transformers' own initialisers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vtexport.errors import ModelError, first_line
from vtexport.models.family import parse_config
from vtexport.models.spec import ModelSpec


def rope_tables(spec: ModelSpec) -> tuple[Any, Any]:
    """The tables cos and sin, float32 [max_positions, head_size / 2]."""
    return tables(*rope_frequencies(spec), spec.decoder.max_positions)


def rope_frequencies(spec: ModelSpec) -> tuple[Any, float]:
    """The inverse frequencies, float32 [head_size / 2], and the factor on cosines and sines (yarn's; else 1).

    Raises:
        ModelError: config.json's settings of RoPE give no finite ones.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Llama, Mistral and Qwen2 share this embedding; only their config.json differs.
    path = Path("config.json")
    text = parse_config(path, spec.config).text_config
    try:
        rotary = LlamaRotaryEmbedding(text)
        frequencies, scaling = rotary.inv_freq, float(rotary.attention_scaling)
    except Exception as error:  # whatever its settings lead to
        raise ModelError(f"{path}: RoPE cannot be computed ({first_line(error)}); check rope_parameters") from error
    sound = frequencies.isfinite().all() and math.isfinite(scaling)
    if not sound or tuple(frequencies.shape) != (spec.decoder.head_size // 2,):
        raise ModelError(f"{path}: RoPE has frequencies that no model has; check rope_parameters")
    return frequencies, scaling


def tables(frequencies: Any, scaling: float, positions: int) -> tuple[Any, Any]:
    """The tables cos and sin of `frequencies` [D / 2], float32 [positions, D / 2], with the factor `scaling`."""
    import torch

    angle = torch.arange(positions, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
    return angle.cos() * scaling, angle.sin() * scaling
