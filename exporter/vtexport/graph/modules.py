"""Building blocks shared by the graphs; parameters are named as in Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vtexport.graph import nn_ops
from vtexport.models.spec import ClipSpec, DecoderSpec, VisionSpec
from vtexport.pruning.choices import cosine, first_best, take
from vtexport.pruning.vision import TowerLayer


class VisionAttention(nn.Module):
    def __init__(self, spec: VisionSpec | ClipSpec) -> None:
        super().__init__()
        width, self.causal = spec.hidden_size, isinstance(spec, ClipSpec)
        self.num_heads = spec.num_heads
        self.scale = spec.head_size**-0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the queries and keys that scores are made of; all [B, S, C]."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.causal:
            heads = self.num_heads
            mixed, _, _ = nn_ops.causal_attention(query, key, value, heads, heads, self.scale)
        else:
            mixed = nn_ops.full_attention(query, key, value, self.num_heads, self.scale)
        return self.out_proj(mixed), query, key


class VisionMLP(nn.Module):
    def __init__(self, spec: VisionSpec | ClipSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)
        self.activation = ACT2FN[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.activation(self.fc1(x)))
        return result


class VisionLayer(nn.Module):
    """A pre-norm transformer layer; causal in CLIP's text tower."""

    def __init__(self, spec: VisionSpec | ClipSpec) -> None:
        super().__init__()
        self.self_attn = VisionAttention(spec)
        self.layer_norm1 = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.mlp = VisionMLP(spec)
        self.layer_norm2 = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, query, key = self.self_attn(self.layer_norm1(x))
        x = x + mixed
        return x + self.mlp(self.layer_norm2(x)), query, key


class VisionEmbeddings(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        if spec.class_token:
            self.class_embedding = nn.Parameter(torch.empty(spec.hidden_size))
        self.patch_embedding = nn.Conv2d(
            spec.channels,
            spec.hidden_size,
            spec.patch_size,
            stride=spec.patch_size,
            bias=spec.kind == "siglip",
        )
        self.position_embedding = nn.Embedding(spec.num_patches + spec.class_token, spec.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + V, C], CLS first; [B, V, C] for a tower without CLS."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        placed: Tensor = x + self.position_embedding.weight
        return placed


class VisionEncoder(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(spec) for _ in range(spec.feature_layer))


class VisionTower(nn.Module):
    """A tower up to the feature layer; later layers never run."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = VisionEmbeddings(spec)
        if spec.kind == "clip":
            self.pre_layrnorm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.encoder = VisionEncoder(spec)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[TowerLayer]]:
        """Features [B, 1 + V, C], and every layer's attention; for a tower without CLS [B, V, C] and an empty list."""
        x = self.embeddings(pixels)
        if self.spec.kind == "clip":
            x = self.pre_layrnorm(x)
        heads = (self.spec.num_heads, self.spec.head_size)
        layers = []
        for layer in self.encoder.layers:
            x, query, key = layer(x)
            if self.spec.class_token:
                cls = query[:, :1].unflatten(2, heads).transpose(1, 2)
                layers.append(TowerLayer(cls, key.unflatten(2, heads).transpose(1, 2)))
        return x, layers


class ClipEmbeddings(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.position_embedding = nn.Embedding(spec.length, spec.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.token_embedding(ids) + self.position_embedding.weight
        return embedded


class ClipEncoder(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(spec) for _ in range(spec.num_layers))


class ClipTextTower(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = ClipEmbeddings(spec)
        self.encoder = ClipEncoder(spec)
        self.final_layer_norm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """The state of each question's end token, [B, L] int64 -> [B, C]; causality hides the tokens behind it."""
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x, _, _ = layer(x)
        end = ids if self.spec.eos_token_id is None else (ids == self.spec.eos_token_id)
        place = first_best(end.float())
        pooled: Tensor = self.final_layer_norm(take(x, place[:, None])[:, 0])
        return pooled


class ClipVisionHead(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)


class Clip(nn.Module):
    """The parts of a CLIP checkpoint that LLaVA's lacks: the text tower, and the projections into the shared space."""

    def __init__(self, spec: ClipSpec, vision: VisionSpec) -> None:
        super().__init__()
        self.text_model = ClipTextTower(spec)
        self.vision_model = ClipVisionHead(vision)
        self.text_projection = nn.Linear(spec.hidden_size, spec.projection, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, spec.projection, bias=False)

    def forward(self, patches: Tensor, ids: Tensor, views: int) -> Tensor:
        """Cosine similarity of every patch [b · views, V, C] and the question [b, L], [b · views, V] fp32."""
        embedded = self.visual_projection(self.vision_model.post_layernorm(patches))
        question = self.text_projection(self.text_model(ids))
        if views > 1:
            question = question.repeat_interleave(views, dim=0)
        return cosine(embedded, question[:, None])[:, :, 0]


class Projector(nn.Module):
    def __init__(self, vision_size: int, hidden_size: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return result


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn_ops.rms_norm(x, self.weight, self.epsilon)


class RotaryTables(nn.Module):
    """cos and sin [max_positions, D / 2]; `vtexport.models.rope.rope_tables` computes what they hold."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.cos: Tensor
        self.sin: Tensor
        size = (spec.max_positions, spec.head_size // 2)
        self.register_buffer("cos", torch.empty(size))
        self.register_buffer("sin", torch.empty(size))


class DecoderAttention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = spec.num_heads, spec.num_kv_heads
        self.scale = spec.head_size**-0.5
        wide, narrow = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        self.q_proj = nn.Linear(spec.hidden_size, wide, bias=spec.query_bias)
        self.k_proj = nn.Linear(spec.hidden_size, narrow, bias=spec.query_bias)
        self.v_proj = nn.Linear(spec.hidden_size, narrow, bias=spec.query_bias)
        self.o_proj = nn.Linear(wide, spec.hidden_size, bias=spec.output_bias)

    def query(self, x: Tensor, positions: Tensor, rope: RotaryTables) -> Tensor:
        """Rotated queries [B, S, H * D]."""
        return nn_ops.rotary(self.q_proj(x), positions, rope.cos, rope.sin, self.num_heads)

    def key(self, x: Tensor, positions: Tensor, rope: RotaryTables) -> Tensor:
        """Rotated keys [B, S, G * D]."""
        return nn_ops.rotary(self.k_proj(x), positions, rope.cos, rope.sin, self.kv_heads)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What new rows take from the values they see [B, S, H * D], and their cache entries; see `extend`."""
        heads = (self.num_heads, self.kv_heads, self.scale)
        if before is None:
            return nn_ops.causal_attention(query, key, value, *heads)
        return nn_ops.cached_attention(query, key, value, *before, *heads)

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output of new rows, and their cache entries; with caches and lengths `before`, those caches with them."""
        mixed, keys, values = self.attend(query, key, value, before)
        return self.o_proj(mixed), keys, values

    def decode(
        self, x: Tensor, positions: Tensor, rope: RotaryTables, past: tuple[Tensor, Tensor], length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query(x, positions, rope), self.key(x, positions, rope)
        return self.extend(query, key, self.v_proj(x), (*past, length))


class DecoderMLP(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = ACT2FN[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return result


class DecoderLayer(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(spec)
        self.mlp = DecoderMLP(spec)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def blocks(self) -> Iterator[DecoderLayer]:
        """The layers, typed as `DecoderLayer`."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def block(self, number: int) -> DecoderLayer:
        """Layer `number`, typed as `blocks` has them."""
        layer = self.layers[number]
        assert isinstance(layer, DecoderLayer)
        return layer
