"""The three graphs of a bundle as PyTorch modules: vision, prefill, decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtexport.graph.modules import Decoder, Projector, RotaryTables, VisionTower
from vtexport.models.spec import ModelSpec
from vtexport.pruning import METHODS, PruningPlan
from vtexport.pruning.base import TowerState, prune


class VisionGraph(nn.Module):
    """pixel_values [B, 3, S, S] fp32 -> visual [B, K, C], kept [B, K] int32, with `debug` also score [B, V].

    Pruning stands before the projector, which works token by token: the same result, cheaper.
    `kept` is absent where no token stays as it was (dense keeps all, pool merges all).
    """

    def __init__(self, spec: ModelSpec, plan: PruningPlan, debug: bool = False) -> None:
        super().__init__()
        self.spec, self.plan, self.debug = spec, plan, debug
        self.method = METHODS[plan.method]
        self.vision = VisionTower(spec.vision)
        self.projector = Projector(
            spec.vision.hidden_size,
            spec.decoder.hidden_size,
            spec.projector_bias,
            spec.projector_activation,
        )
        self.pruning = nn.Module()
        for name, array in self.method.constants(plan, spec.vision.grid).items():
            kind = torch.from_numpy(array[:0]).dtype
            self.pruning.register_buffer(name, torch.empty(array.shape, dtype=kind))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        pixels = pixel_values.to(self.vision.embeddings.class_embedding.dtype)
        features, query, key = self.vision(pixels)
        state = TowerState(features, query, key, self.spec.vision.head_size**-0.5, self.spec.vision.grid)
        pruned = prune(self.method, self.plan, state, dict(self.pruning.named_buffers()))
        outputs = [self.projector(pruned.tokens)]
        if pruned.index is not None:
            outputs.append(pruned.index)
        if self.debug and pruned.score is not None:
            outputs.append(pruned.score)
        return tuple(outputs)

    def output_names(self) -> list[str]:
        names = ["visual"]
        if self.plan.stages and self.plan.stages[0].kept > self.plan.leading:
            names.append("kept")
        if self.debug and self.method.scores:
            names.append("score")
        return names


class _LanguageGraph(nn.Module):
    """The decoder with its head; prefill and decode have the same parameters by the same names."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.decoder = Decoder(spec.decoder)
        self.rope = RotaryTables(spec.decoder)
        if not spec.decoder.tied_embeddings:
            self.head = nn.Linear(spec.decoder.hidden_size, spec.decoder.vocab_size, bias=False)

    def logits(self, last: Tensor) -> Tensor:
        """[B, C] -> [B, vocabulary] fp32."""
        normed = self.decoder.norm(last)
        if self.spec.decoder.tied_embeddings:
            return nn.functional.linear(normed, self.decoder.embed_tokens.weight).float()
        result: Tensor = self.head(normed).float()
        return result


class PrefillGraph(_LanguageGraph):
    """A whole prompt at once, every row of its own length, padded on the right.

    Inputs: input_ids [B, L] int64 without the image, image_position [B] int64 (text tokens before it),
    text_length [B] int64, visual [B, K, C]. Outputs: logits [B, vocabulary] fp32 of each row's last token,
    and per layer the cache entries key, value [B, G, L + K, D].
    """

    def __init__(self, spec: ModelSpec, visual_tokens: int) -> None:
        super().__init__(spec)
        self.visual_tokens = visual_tokens

    def forward(
        self, input_ids: Tensor, image_position: Tensor, text_length: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        text = self.decoder.embed_tokens(input_ids)
        batch, length, width = text.shape
        count = self.visual_tokens
        place = torch.arange(length + count, device=input_ids.device)[None]
        at = image_position[:, None]
        # Where each place of the row comes from: text, then the image's tokens, then the rest of the text.
        # Rows differ in `at`, so a gather puts them together; padding stays on the right.
        source = torch.where(place < at + count, place - at + length, place - count)
        source = torch.where(place < at, place, source)
        x = torch.cat([text, visual.to(text.dtype)], dim=1).gather(1, source[..., None].expand(-1, -1, width))
        positions = place.expand(batch, -1)
        caches = []
        for layer in self.decoder.blocks():
            mixed, key, value = layer.self_attn.prefill(layer.input_layernorm(x), positions, self.rope)
            x = x + mixed
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            caches += [key, value]
        last = (text_length + (count - 1))[:, None, None].expand(-1, 1, width)
        return self.logits(x.gather(1, last)[:, 0]), *caches


class DecodeGraph(_LanguageGraph):
    """One token a row behind its cache.

    Inputs: input_ids [B, 1] int64, length [B] int64 (tokens in each row's cache), and per layer the caches
    key, value [B, G, M, D]. Outputs: logits [B, vocabulary] fp32 and the caches with the new token in place.
    """

    def forward(self, input_ids: Tensor, length: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        x = self.decoder.embed_tokens(input_ids)
        positions = length[:, None]
        caches = []
        for number, layer in enumerate(self.decoder.blocks()):
            cache = (past[2 * number], past[2 * number + 1])
            mixed, key, value = layer.self_attn.decode(layer.input_layernorm(x), positions, self.rope, cache, length)
            x = x + mixed
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            caches += [key, value]
        return self.logits(x[:, 0]), *caches


def cache_names(kind: str, layers: int) -> list[str]:
    """Names of cache inputs (`past`) or outputs (`present`), in the order of the graphs."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
