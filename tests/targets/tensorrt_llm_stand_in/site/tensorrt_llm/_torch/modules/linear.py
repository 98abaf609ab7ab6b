"""Linear layers and how their weights are loaded."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...functional import AllReduceStrategy
from ...mapping import Mapping


class WeightMode(enum.StrEnum):
    """Which tensors of a checkpoint make a layer."""

    VANILLA = "vanilla"
    FUSED_GATE_UP_LINEAR = "fused_gate_up_linear"
    FUSED_QKV_LINEAR = "fused_qkv_linear"


_PARTS = {WeightMode.VANILLA: 1, WeightMode.FUSED_GATE_UP_LINEAR: 2, WeightMode.FUSED_QKV_LINEAR: 3}


@dataclass(kw_only=True)
class WeightsLoadingConfig:
    """How weights are loaded."""

    weight_mode: WeightMode = WeightMode.VANILLA
    ignore_tensor_parallel: bool = False


class TensorParallelMode(enum.StrEnum):
    """Along which axis a layer is split."""

    COLUMN = "column"
    ROW = "row"


class Linear(nn.Module):
    """A linear layer, or several in one."""

    has_fp8_qdq = has_nvfp4 = has_fp8_block_scales = has_fp8_rowwise = has_any_quant = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
        quant_config: Any = None,
        weights_loading_config: WeightsLoadingConfig | None = None,
        reduce_output: bool = True,
        skip_create_weights_in_init: bool = False,
        use_custom_cublas_mm: bool = False,
        lora: Any = None,
        allreduce_strategy: AllReduceStrategy = AllReduceStrategy.AUTO,
        force_dynamic_quantization: bool = False,
        use_cute_dsl_blockscaling_mm: bool = False,
        use_cute_dsl_nvfp4_blockscaling_mm: bool = False,
        use_cublaslt_nvfp4_blockscaling_mm: bool = False,
        disable_deep_gemm: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias, self.dtype = in_features, out_features, bias, dtype
        self.mapping = mapping or Mapping()
        self.tp_size, self.tp_rank, self.tp_mode = self.mapping.tp_size, self.mapping.tp_rank, tensor_parallel_mode
        self.gather_output, self.quant_config = gather_output, quant_config
        self.weights_loading_config = weights_loading_config or WeightsLoadingConfig()
        self._weights_created = False
        if not skip_create_weights_in_init:
            self.create_weights()

    def create_weights(self) -> None:
        """Make the parameters, once."""
        if self._weights_created:
            return
        if self.tp_size > 1:
            raise NotImplementedError("the stand-in computes on one device")
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=self.dtype), requires_grad=False)
        self._weights_created = True

    def forward(
        self,
        input: torch.Tensor,
        *,
        all_reduce_params: Any = None,
        lora_params: dict | None = None,
        layer_idx: int | None = None,
    ) -> torch.Tensor:
        """`input`, `[tokens, in_features]`, times the weight."""
        return F.linear(input, self.weight, self.bias)

    def load_weights(self, weights: list[dict]) -> None:
        """Load one dictionary for each of the tensors that make this layer."""
        assert self._weights_created
        assert len(weights) == _PARTS[self.weights_loading_config.weight_mode]
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.data.copy_(torch.cat([part[name][:] for part in weights]))
