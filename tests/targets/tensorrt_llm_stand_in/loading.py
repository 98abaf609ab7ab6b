"""From a folder to a model, in the way of TensorRT-LLM's loader."""

from __future__ import annotations

import copy
import inspect
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


def load_model(folder: Path, config: Any) -> nn.Module:
    """Make the model and load every safetensors file of `folder` into it.

    The constructor runs with `torch.empty` on the meta device first; if it computes with that, once more without.
    """
    from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
    from tensorrt_llm._torch.models.modeling_utils import MetaInitException, MetaInitMode

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
    except (MetaInitException, NotImplementedError):
        model = AutoModelForCausalLM.from_config(config)
    model.to("cpu")
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    # TensorRT-LLM looks at the parameters' names to see whether a model takes a mapper.
    if "weight_mapper" in inspect.signature(model.load_weights).parameters:
        model.load_weights(weights, weight_mapper=WeightMapper())
    else:
        model.load_weights(weights)
    for module in model.modules():
        if hasattr(module, "post_load_weights"):
            module.post_load_weights()
    return model
