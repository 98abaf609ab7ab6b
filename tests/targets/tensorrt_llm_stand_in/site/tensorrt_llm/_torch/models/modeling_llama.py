"""Llama, and what differs from it by a bias alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...functional import PositionEmbeddingType
from ..attention_backend import AttentionMetadata
from ..attention_backend.interface import PositionalEmbeddingParams, RopeParams
from ..model_config import ModelConfig
from ..modules.attention import Attention
from ..modules.decoder_layer import DecoderLayer
from ..modules.embedding import Embedding
from ..modules.gated_mlp import GatedMLP
from ..modules.linear import TensorParallelMode
from ..modules.rms_norm import RMSNorm
from .modeling_utils import DecoderModel, DecoderModelForCausalLM, register_auto_model


class _Layer(DecoderLayer):
    def __init__(self, model_config: ModelConfig, layer_idx: int, bias: bool) -> None:
        super().__init__()
        config, dtype = model_config.pretrained_config, model_config.torch_dtype
        self.self_attn = Attention(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=bias,
            pos_embd_params=PositionalEmbeddingParams(
                type=PositionEmbeddingType.rope_gpt_neox, rope=RopeParams.from_config(config)
            ),
            layer_idx=layer_idx,
            dtype=dtype,
            dense_bias=False,
            config=model_config,
        )
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            bias=False,
            dtype=dtype,
            config=model_config,
        )
        norm: dict[str, Any] = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps, "dtype": dtype}
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(**norm), RMSNorm(**norm)

    def forward(
        self,
        position_ids: torch.IntTensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, and the residual to add to them."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(
            position_ids=position_ids, hidden_states=hidden_states, attn_metadata=attn_metadata, **kwargs
        )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class LlamaModel(DecoderModel):
    """Llama's decoder."""

    qkv_bias = False

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__(model_config)
        config, dtype = model_config.pretrained_config, model_config.torch_dtype
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([_Layer(model_config, layer, self.qkv_bias) for layer in layers])
        self.norm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.IntTensor | None = None,
        position_ids: torch.IntTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states of every token."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(position_ids, hidden_states, attn_metadata, residual)
        return self.norm(hidden_states, residual)[0]


class Qwen2Model(LlamaModel):
    """Qwen2's decoder: queries, keys and values have a bias."""

    qkv_bias = True


@register_auto_model("LlamaForCausalLM")
@register_auto_model("MistralForCausalLM")
class LlamaForCausalLM(DecoderModelForCausalLM):
    """Llama with its last layer."""

    decoder = LlamaModel

    def __init__(self, model_config: ModelConfig) -> None:
        config = model_config.pretrained_config
        super().__init__(
            self.decoder(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


@register_auto_model("Qwen2ForCausalLM")
class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with its last layer."""

    decoder = Qwen2Model
