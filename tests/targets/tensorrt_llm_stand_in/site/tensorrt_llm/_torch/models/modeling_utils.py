"""What decoders have in common, and the register of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any_only

from ..attention_backend import AttentionMetadata
from ..model_config import ModelConfig, TConfig
from ..modules.embedding import LMHead
from ..modules.linear import TensorParallelMode
from ..modules.logits_processor import LogitsProcessor

TModel = TypeVar("TModel")


class MetaInitException(RuntimeError):
    """Something was computed from weights that are not there yet."""


class MetaInitMode(TorchDispatchMode):
    """Models are made with `torch.empty` on the meta device; a constructor that computes with that runs again without."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put empty tensors on the meta device, and let random initialisation pass."""
        aten, kwargs = torch.ops.aten, dict(kwargs or {})
        if func in (aten.empty.memory_format, aten.empty_like.default):
            return func(*args, **{**kwargs, "device": torch.device("meta")})
        random = func in (aten.normal_.default, aten.uniform_.default)
        if not random and tree_any_only(torch.Tensor, lambda one: one.is_meta, (args, kwargs)):
            raise MetaInitException(f"{func} of a tensor on the meta device")
        return func(*args, **kwargs)


class PPInitCaller(type):
    """The metaclass of decoders."""


class DecoderModel(nn.Module, metaclass=PPInitCaller):
    """Embeddings, layers and the last normalisation."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.dtype = model_config.torch_dtype
        self.model_config = model_config
        self.prologue: list[nn.Module] = []
        self.epilogue: list[nn.Module] = []
        self.keep_embed_tokens = False

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.IntTensor = None,
        position_ids: torch.IntTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        lora_params: dict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states of every token, for layers without a residual of their own."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(position_ids=position_ids, hidden_states=hidden_states, attn_metadata=attn_metadata)
        return self.norm(hidden_states)

    def __pp_init__(self) -> None:
        """Drop the layers of other GPUs: there are none."""


class PostInitCaller(type):
    """Calls `__post_init__`, which makes the weights, after the whole constructor."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object."""
        made = super().__call__(*args, **kwargs)
        made.__post_init__()
        made.__pp_init__()
        return made


class DecoderModelForCausalLM(nn.Module, Generic[TModel, TConfig], metaclass=PostInitCaller):
    """A decoder and its last layer."""

    def __init__(self, model: TModel, *, config: ModelConfig[TConfig], hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.model_config, self.model = config, model
        self.pp_rank, self.pp_size = config.mapping.pp_rank, config.mapping.pp_size
        self.lm_head = LMHead(
            vocab_size,
            hidden_size,
            dtype=config.torch_dtype,
            mapping=config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        if config.pretrained_config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.logits_processor = LogitsProcessor()
        self.prologue: list[nn.Module] = []
        self.epilogue: list[nn.Module] = [self.lm_head]

    def __pp_init__(self) -> None:
        """Drop the layers of other GPUs: there are none."""

    def __post_init__(self) -> None:
        """Make the weights of all layers."""
        for module in self.modules():
            if callable(getattr(module, "create_weights", None)):
                module.create_weights()

    @property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self.model_config.pretrained_config

    @property
    def vocab_size_padded(self) -> int:
        """Logits of a row."""
        return self.lm_head.vocab_size_padded

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.IntTensor = None,
        position_ids: torch.IntTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_context_logits: bool = False,
        spec_metadata: Any = None,
        lora_params: dict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Logits of each sequence's last token, by `attn_metadata`."""
        output = self.model(
            input_ids=input_ids,
            attn_metadata=attn_metadata,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            spec_metadata=spec_metadata,
            lora_params=lora_params,
        )
        return self.logits_processor.forward(output, self.lm_head, attn_metadata, return_context_logits)

    def load_weights(
        self,
        weights: dict,
        weight_mapper: Any = None,
        skip_modules: list[str] = [],  # noqa: B006 - as TensorRT-LLM has it
    ) -> None:
        """Load a checkpoint's tensors by the names of modules.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, module in self.named_modules():
            if not module._parameters or any(skipped in name for skipped in skip_modules):
                continue
            if self.config.tie_word_embeddings and name.startswith("lm_head"):
                continue
            *parents, last = name.split(".")
            parts = _FUSED.get(last)
            if parts:
                found = [filter_weights(".".join([*parents, part]), weights) for part in parts]
                module.load_weights(weights=found)
            elif hasattr(module, "load_weights"):
                module.load_weights(weights=[filter_weights(name, weights)])
            else:
                own = filter_weights(name, weights)
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(own[key][:])

    def infer_max_seq_len(self) -> int:
        """The longest sequence by the configuration."""
        scaling = getattr(self.config, "rope_scaling", None) or {}
        kind, factor = scaling.get("type", scaling.get("rope_type")), scaling.get("factor", 1.0)
        longest = getattr(self.config, "max_position_embeddings", None) or 2048
        return longest if kind in ("su", "longrope", "llama3", "yarn") else math.ceil(longest * factor)


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MODEL_CLASS_MAPPING: dict[str, type] = {}
MODEL_CLASS_VISION_ENCODER_MAPPING: dict[str, tuple[type, type | None]] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    """Decorates the model of architecture `name`; the last one to be registered counts."""

    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator


def register_vision_encoder(vision_encoder_cls: type, vlm_base_model: type | None = None) -> Callable[[type], type]:
    """Decorates a registered model that has a vision encoder of this class."""

    def wrapper(model_cls: type) -> type:
        names = [name for name, one in MODEL_CLASS_MAPPING.items() if one.__name__ == model_cls.__name__]
        if not names:
            raise ValueError(f"{model_cls.__name__} is not registered")
        MODEL_CLASS_VISION_ENCODER_MAPPING[names[0]] = (vision_encoder_cls, vlm_base_model)
        return model_cls

    return wrapper


def get_model_architecture(model_config: Any) -> tuple[type, str]:
    """The class and name of the architecture of a checkpoint's configuration.

    Raises:
        RuntimeError: it is not known.
    """
    name = (model_config.architectures or [None])[0]
    if name not in MODEL_CLASS_MAPPING:
        raise RuntimeError(f"unknown architecture {name}")
    return MODEL_CLASS_MAPPING[name], name


def filter_weights(prefix: str, weights: dict) -> dict:
    """Those whose name begins with `prefix`, without it and the character after it."""
    return {name[len(prefix) + 1 :]: weight for name, weight in weights.items() if name.startswith(prefix)}
