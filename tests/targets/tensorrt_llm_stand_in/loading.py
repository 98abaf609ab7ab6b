"""From a folder to a model, in the way of TensorRT-LLM's loader."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


class WeightMapper:
    """What a loader hands to models that take it; ours knows no more than the names of modules."""


def model_config(folder: Path, **settings: Any) -> Any:
    """A `ModelConfig` for the checkpoint in `folder`."""
    from tensorrt_llm._torch.model_config import ModelConfig
    from transformers import AutoConfig

    made = ModelConfig(pretrained_config=AutoConfig.from_pretrained(str(folder)), **settings)
    made._frozen = True
    return made


class ConsumableWeights:
    """Weights as TensorRT-LLM's loader hands them out in newer versions: like a dictionary, but none."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._weights[key]

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        self._weights[key] = value

    def __delitem__(self, key: str) -> None:
        del self._weights[key]

    def __contains__(self, key: str) -> bool:
        return key in self._weights

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._weights))

    def keys(self) -> list[str]:
        """All names."""
        return list(self._weights)

    def values(self) -> list[torch.Tensor]:
        """All tensors."""
        return list(self._weights.values())

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """Names with tensors."""
        return list(self._weights.items())

    def mark_consumed(self, prefix: str) -> int:
        """Forget those of a module, which are loaded."""
        gone = [name for name in self._weights if name.startswith(prefix + ".")]
        for name in gone:
            del self._weights[name]
        return len(gone)


def load_model(folder: Path, config: Any, consumable: bool = True) -> nn.Module:
    """Make the model and load every safetensors file of `folder` into it, as `ConsumableWeights` if so wanted.

    The constructor runs with `torch.empty` on the meta device first; if that fails in any way, once more without.
    """
    from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
    from tensorrt_llm._torch.models.modeling_utils import MetaInitMode

    try:
        with MetaInitMode():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        real: dict[torch.Tensor, torch.Tensor] = {}

        def allocate(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return tensor
            if tensor not in real:
                # Memory that no one has written: NaN, so that reading it shows.
                real[tensor] = torch.empty_like(tensor, device="cpu")
                if tensor.is_floating_point():
                    real[tensor].fill_(float("nan"))
            return real[tensor]

        model._apply(allocate)
    except Exception:  # noqa: BLE001 - whatever it is, as TensorRT-LLM does
        model = AutoModelForCausalLM.from_config(config)
    model.to("cpu")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    weights = ConsumableWeights(tensors) if consumable else tensors
    # TensorRT-LLM looks at the parameters' names to see whether a model takes a mapper.
    if "weight_mapper" in inspect.getfullargspec(model.load_weights).args:
        model.load_weights(weights, weight_mapper=WeightMapper())
    else:
        model.load_weights(weights)
    for module in model.modules():
        if hasattr(module, "post_load_weights"):
            module.post_load_weights()
    return model
