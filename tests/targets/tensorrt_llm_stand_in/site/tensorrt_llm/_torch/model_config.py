"""Everything that a model's constructor is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ..functional import AllReduceStrategy
from ..mapping import Mapping
from ..models.modeling_utils import QuantConfig

TConfig = TypeVar("TConfig")


@dataclass(kw_only=True)
class ModelConfig(Generic[TConfig]):
    """The checkpoint's configuration and how it is run."""

    pretrained_config: TConfig | None = None
    mapping: Mapping = field(default_factory=Mapping)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    quant_config_dict: dict[str, QuantConfig] | None = None
    skip_create_weights_in_init: bool = False
    spec_config: Any = None
    lora_config: Any = None
    sparse_attention_config: Any = None
    is_generation: bool = True
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    attn_backend: str = "TRTLLM"
    moe_backend: str = "CUTLASS"
    allreduce_strategy: AllReduceStrategy = AllReduceStrategy.AUTO
    enable_min_latency: bool = False
    use_cuda_graph: bool = False
    force_dynamic_quantization: bool = False
    extra_attrs: dict = field(default_factory=dict, repr=False, init=False)
    _frozen: bool = field(default=False, init=False, repr=False)
    mm_encoder_only: bool = False

    def __setattr__(self, key: str, value: Any) -> None:
        """Set it, unless the configuration is frozen: then only what TensorRT-LLM lets models of images change.

        Raises:
            AttributeError: it is frozen.
        """
        changeable = ("_frozen", "extra_attrs", "pretrained_config", "quant_config")
        if getattr(self, "_frozen", False) and key not in changeable:
            raise AttributeError(f"ModelConfig.{key} is frozen")
        super().__setattr__(key, value)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The checkpoint's dtype."""
        # TensorRT-LLM 1.2 reads `torch_dtype`, which is `dtype` in the transformers that we run with.
        return getattr(self.pretrained_config, "dtype", None) or torch.bfloat16

    @property
    def enable_flash_mla(self) -> bool:
        """Not for these models."""
        return False

    def get_quant_config(self, name: str | None = None) -> QuantConfig:
        """How layer `name` is quantised."""
        return self.quant_config
