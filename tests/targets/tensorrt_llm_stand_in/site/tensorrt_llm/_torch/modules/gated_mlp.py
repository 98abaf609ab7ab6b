"""The feed-forward part of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..model_config import ModelConfig
from .linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig


class GatedMLP(nn.Module):
    """SiLU of one product times another, then a third."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
        dtype: torch.dtype | None = None,
        config: ModelConfig | None = None,
        overridden_tp_size: int | None = None,
        reduce_output: bool = True,
        layer_idx: int | None = None,
        use_cute_dsl_blockscaling_mm: bool = False,
        disable_deep_gemm: bool = False,
    ) -> None:
        super().__init__()
        if activation != F.silu:
            raise NotImplementedError("the stand-in has SiLU alone")
        config = config or ModelConfig()
        common: dict[str, Any] = {
            "bias": bias,
            "dtype": dtype,
            "quant_config": config.get_quant_config(),
            "skip_create_weights_in_init": config.skip_create_weights_in_init,
        }
        self.gate_up_proj = Linear(
            hidden_size,
            intermediate_size * 2,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_GATE_UP_LINEAR),
            **common,
        )
        self.down_proj = Linear(intermediate_size, hidden_size, tensor_parallel_mode=TensorParallelMode.ROW, **common)

    def forward(
        self,
        x: torch.Tensor,
        all_rank_num_tokens: list[int] | None = None,
        final_all_reduce_params: Any = None,
        lora_params: dict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`x`, `[tokens, hidden_size]`, through the three products."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
