"""Rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...functional import RotaryScalingType


@dataclass(kw_only=True, unsafe_hash=True)
class RopeParams:
    """Frequencies, and how they are scaled."""

    dim: int = 0
    theta: float = 10000.0
    alpha: float = 1.0
    scale_type: RotaryScalingType = RotaryScalingType.none
    scale: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_m_scale: float = 1.0
    long_m_scale: float = 1.0
    max_positions: int = 1024
    original_max_positions: int = 1024
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float] | None = None
    long_factor: tuple[float] | None = None
    max_seq_len: int | None = None
    duplicate_data: bool = True

    @staticmethod
    def from_config(config: Any) -> RopeParams:
        """From a decoder's configuration, by the names of transformers 4: `rope_theta` and `rope_scaling`.

        A configuration of transformers 5 has `rope_parameters` in their place; this looks there only if it must
        because the stand-in runs with transformers 5 where TensorRT-LLM 1.2 demands 4.57.
        """
        head = getattr(config, "head_dim", None)
        head = head if isinstance(head, int) else config.hidden_size // config.num_attention_heads
        new = getattr(config, "rope_parameters", None) or {}
        scaling = getattr(config, "rope_scaling", None) or new
        made = RopeParams(max_positions=config.max_position_embeddings)
        made.theta = getattr(config, "rope_theta", None) or new.get("rope_theta") or 10000.0
        made.dim = int(head * (getattr(config, "partial_rotary_factor", None) or 1.0))
        kind = scaling.get("type") or scaling.get("rope_type") or "default"
        made.scale_type = RotaryScalingType.from_string(kind)
        if made.scale_type != RotaryScalingType.none:
            made.scale = scaling.get("factor", 1.0)
            made.low_freq_factor = scaling.get("low_freq_factor", 1.0)
            made.high_freq_factor = scaling.get("high_freq_factor", 4.0)
            made.original_max_positions = scaling.get("original_max_position_embeddings") or 1024
        return made

    def frequencies(self) -> torch.Tensor:
        """Radians per position, `[dim / 2]`.

        Raises:
            NotImplementedError: a way to scale that the stand-in lacks.
        """
        inverse = self.theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        if self.scale_type == RotaryScalingType.none:
            return inverse
        if self.scale_type == RotaryScalingType.linear:
            return inverse / self.scale
        if self.scale_type != RotaryScalingType.llama3:
            raise NotImplementedError(f"the stand-in has no rope scaling {self.scale_type.name}")
        waves = 2 * math.pi / inverse
        rough = self.original_max_positions / waves
        share = ((rough - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return share * inverse + (1 - share) * inverse / self.scale


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotate `x`, `[tokens, heads, dim]`, the halves of a head's numbers being pairs."""
    angles = positions.to(torch.float32)[:, None, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
