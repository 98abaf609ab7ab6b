"""The language model as PyTorch modules: prefill and decode. `vtexport.graph.language` has both in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from vtexport.graph.modules import Decoder, RotaryTables
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import Attention, Counts, DecoderState, drop, rated, rows_that_rate
from vtexport.pruning.layout import Layout
from vtexport.pruning.ops import token_score


class _DecoderGraph(nn.Module):
    """The decoder with its head; prefill and decode share its parameters by name."""

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


@dataclass(frozen=True)
class Before:
    """What the rows of a batch hold before new ones join them.

    Attributes:
        caches: keys and values [B, G, M_i, D] of each layer, one after the other.
        length: [N, B] int64, tokens in each layer's cache of each row.
        position: [N, B] int64, the position of the first new row, in each layer.
    """

    caches: Sequence[Tensor]
    length: Tensor
    position: Tensor

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of `layer`, and their lengths [B]."""
        return self.caches[2 * layer], self.caches[2 * layer + 1], self.length[layer]


class PrefillGraph(_DecoderGraph):
    """A whole prompt at once, pruned inside as the plan says; every row has its own length, padded on the right.

    Inputs: input_ids [B, L] int64 without the image, image_position [B] int64 (text tokens before it), text_length [B]
    int64, visual [B, K, C]; for a method that is given its scores also ranking [B, V] fp32. With n images per prompt,
    image_position is [B, n]. If n > 1 or rows differ in their number of visual tokens, there is also visual_length
    [B, n] int64, the visual tokens of each image.

    Outputs: logits [B, vocabulary] fp32 of each row's last token; per layer i the cache entries key, value
    [B, G, L + V_i, D] with V_i visual tokens as the plan says; and per decoder stage kept.i [B, K'] int32, indices into
    the visual tokens that entered it. With `debug` also the stages' score.i [B, V_i] fp32 and cluster.i [B, V_i] int32,
    and raters [B, L] bool. With `gives_ranking` also ranking [B, V] fp32: attention to each visual token summed over
    layers, heads and the prompt's text after the image.
    """

    def __init__(self, spec: ModelSpec, plan: PruningPlan, debug: bool = False, gives_ranking: bool = False) -> None:
        super().__init__(spec)
        self.plan, self.debug, self.gives_ranking = plan, debug, gives_ranking
        self.method = plan.methods.decoder
        self.counts: dict[int, Counts] = {}
        if self.method is not None:
            self.counts = {layer: self.method.counts(stage) for layer, stage in plan.decoder_stages.items()}

    def forward(
        self,
        input_ids: Tensor,
        image_position: Tensor,
        text_length: Tensor,
        visual: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (input_ids, image_position, text_length, visual, *others)
        return self.run(dict(zip(self.input_names(), inputs, strict=True)))

    def run(self, given: Mapping[str, Tensor], before: Before | None = None) -> tuple[Tensor, ...]:
        """The graph's outputs; `before` is what the rows hold already."""
        rows, raters = self.entering(given)
        layout = rows.layout
        caches: list[Tensor] = []
        seen: list[Tensor | None] = []
        total = None
        # A ranking needs the last layer's queries too.
        whole = self.plan.num_layers if self.gives_ranking else self.plan.num_layers - 1
        for number in range(whole):
            query, key, mixed, *cache = self.attended(number, rows, before)
            caches += cache
            if self.gives_ranking:
                paid = self.paid(number, query, cache[0], layout, before)
                total = paid if total is None else total + paid
            rows = self.after(number, rows, mixed)
            if number in self.counts:
                assert self.method is not None, "a plan with decoder stages has a decoder-stage method"
                rate = partial(self._score, number, query, key, rows, raters, given)
                dropped = drop(self.plan, self.counts[number], rows, rate)
                rows = dropped.sequence
                score = dropped.score if self.method.scores else None
                seen += [dropped.index, score, dropped.cluster][: 3 if self.debug else 1]
        if self.debug and raters is not None:
            seen.append(raters)
        seen.append(total)
        if whole < self.plan.num_layers:
            last, *cache = self.ending(rows, before)
            caches += cache
        else:
            last = rows.layout.rows_of(rows.hidden, rows.layout.last_place()[:, None])
        return self.logits(last[:, 0]), *caches, *(tensor for tensor in seen if tensor is not None)

    def entering(self, given: Mapping[str, Tensor]) -> tuple[DecoderState, Tensor | None]:
        """The decoder's input rows, and which text tokens rate ([B, L] bool, or None), from the graph's inputs."""
        text = self.decoder.embed_tokens(given["input_ids"])
        visual = given["visual"].to(text.dtype)
        position, width = given["image_position"], given["input_ids"].shape[1]
        at = position if position.ndim == 2 else position[:, None]
        layout = Layout(at, given["text_length"], width, visual.shape[1], given.get("visual_length"))
        hidden = layout.bare().with_visual(text, visual, layout)
        rows = DecoderState(hidden, layout.places(), layout)
        return rows, None if self.method is None else self.method.rating_rows(visual, text, layout)

    def attended(self, number: int, rows: DecoderState, before: Before | None = None) -> tuple[Tensor, ...]:
        """Attention of layer `number` on `rows`: queries and keys after RoPE, its output [B, S, C], two cache entries."""
        layer, positions = self.decoder.block(number), self._positions(number, rows, before)
        attention, x = layer.self_attn, layer.input_layernorm(rows.hidden)
        query, key = (part(x, positions, self.rope) for part in (attention.query, attention.key))
        value = attention.v_proj(x)
        return query, key, *attention.extend(query, key, value, None if before is None else before.of(number))

    def ending(self, rows: DecoderState, before: Before | None) -> tuple[Tensor, ...]:
        """The last layer, for each prompt's last token alone: its output [B, 1, C], and the cache entries of all tokens.

        Logits are made of that token only, so that of all others the layer's keys and values are enough.
        """
        number, place = self.plan.num_layers - 1, rows.layout.last_place()[:, None]
        layer, positions = self.decoder.block(number), self._positions(number, rows, before)
        attention, x = layer.self_attn, layer.input_layernorm(rows.hidden)
        query = attention.query(rows.layout.rows_of(x, place), positions.gather(1, place), self.rope)
        key, value = attention.key(x, positions, self.rope), attention.v_proj(x)
        # Repeated at every place, the query sees at its own place what it should. So attention has the form that it has
        # in all other layers, and costs little beside the products that are saved.
        everywhere = query.expand(-1, key.shape[1], -1)
        mixed, *cache = attention.attend(everywhere, key, value, None if before is None else before.of(number))
        alone = replace(rows, hidden=rows.layout.rows_of(rows.hidden, place))
        return self.after(number, alone, attention.o_proj(rows.layout.rows_of(mixed, place))).hidden, *cache

    def _positions(self, number: int, rows: DecoderState, before: Before | None) -> Tensor:
        """The positions of `rows` in layer `number`, [B, S] int64."""
        return rows.positions if before is None else rows.positions + before.position[number][:, None]

    def after(self, number: int, rows: DecoderState, mixed: Tensor) -> DecoderState:
        """The rows behind layer `number`, whose attention gave `mixed`."""
        layer, x = self.decoder.block(number), rows.hidden + mixed
        return replace(rows, hidden=x + layer.mlp(layer.post_attention_layernorm(x)))

    def _score(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        rows: DecoderState,
        raters: Tensor | None,
        given: Mapping[str, Tensor],
    ) -> Tensor:
        """Scores [B, V] at the stage after layer `number`, from that layer's rotated queries and keys."""
        assert self.method is not None
        score = self.method.given_score(given)
        if score is not None:
            return score
        return rated(self.method, self._attention(number, query, key, rows, raters), rows.layout, raters)

    def paid(self, number: int, query: Tensor, keys: Tensor, layout: Layout, before: Before | None) -> Tensor:
        """Attention [B, V] to each visual token in layer `number`, summed over heads and the text after the image.

        Args:
            number: the layer.
            query: [B, S, H * D] after RoPE.
            keys: [B, G, N, D], the layer's cache.
            layout: where text and image stand.
            before: what the rows held already.
        """
        attention, ranked = self.decoder.block(number).self_attn, self.plan.vision_tokens
        places, start = layout.text_places(), layout.image_position[:, 0]
        queries = layout.rows_of(query, places).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        in_cache = places if before is None else places + before.length[number][:, None]
        rows = layout.of_prompt() & (in_cache >= start[:, None] + ranked)
        mean = token_score(queries, keys, in_cache.masked_fill(~rows, -1), start, ranked, attention.scale)
        return mean * (rows.float().sum(dim=1, keepdim=True) * attention.num_heads)

    def _attention(
        self, number: int, query: Tensor, key: Tensor, rows: DecoderState, raters: Tensor | None
    ) -> Attention:
        """The attention that rates at the stage after layer `number`, from that layer's rotated queries and keys."""
        assert self.method is not None
        if self.method.attention_of == "next":
            return self.attention_of(number + 1, rows, raters)
        computed, _ = rows_that_rate(rows.layout, raters)
        return self._rating(number, rows.layout.rows_of(query, computed), key, rows, raters)

    def attention_of(self, number: int, rows: DecoderState, raters: Tensor | None) -> Attention:
        """The attention of layer `number`, which `rows` enter, from its norm, queries and keys alone."""
        layer = self.decoder.block(number)
        computed, _ = rows_that_rate(rows.layout, raters)
        attention, x = layer.self_attn, layer.input_layernorm(rows.hidden)
        positions = rows.positions.gather(1, computed)
        query = attention.query(rows.layout.rows_of(x, computed), positions, self.rope)
        return self._rating(number, query, attention.key(x, rows.positions, self.rope), rows, raters)

    def _rating(self, number: int, query: Tensor, key: Tensor, rows: DecoderState, raters: Tensor | None) -> Attention:
        """The attention of layer `number` from the rotated queries of the rows that rate, and all rotated keys."""
        module, (_, places) = self.decoder.block(number).self_attn, rows_that_rate(rows.layout, raters)
        return Attention(
            query, key, module.num_heads, module.kv_heads, module.scale, places, rows.positions, self.rope.cos
        )

    def output_names(self) -> list[str]:
        names = ["logits", *cache_names("present", self.plan.num_layers)]
        for layer, counts in self.counts.items():
            assert self.method is not None
            names += stage_outputs(layer, counts, self.debug, self.method.scores)
        if self.debug and self.method is not None and self.method.raters == "text":
            names.append("raters")
        return [*names, "ranking"] if self.gives_ranking else names

    def input_names(self) -> list[str]:
        names = ["input_ids", "image_position", "text_length", "visual"]
        if self.method is not None:
            names += [extra.name for extra in self.method.extras]
        return [*names, "visual_length"] if self.spec.views.counted else names


class DecodeGraph(_DecoderGraph):
    """One token per row behind its caches, whichever plan filled them.

    Inputs: input_ids [B, 1] int64, length [N, B] int64 (tokens in each layer's cache of each row), position [N, B]
    int64 (of the new token, in each layer), and per layer the caches key, value [B, G, M_i, D]. Outputs: logits
    [B, vocabulary] fp32 and the caches with the new token in place. With `ranked`, the number of visual tokens to rank,
    there are also the input image_position [B] int64 and the output ranking [B, V] fp32, the new token's attention to
    each visual token summed over layers and heads.
    """

    def __init__(self, spec: ModelSpec, ranked: int = 0) -> None:
        super().__init__(spec)
        self.ranked = ranked

    def forward(
        self,
        input_ids: Tensor,
        length: Tensor,
        position: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        past = others[: 2 * self.spec.decoder.num_layers]
        image_position = others[-1] if self.ranked else None
        x = self.decoder.embed_tokens(input_ids)
        caches: list[Tensor] = []
        total = None
        for number, layer in enumerate(self.decoder.blocks()):
            cache = (past[2 * number], past[2 * number + 1])
            attention, normed, place = layer.self_attn, layer.input_layernorm(x), position[number][:, None]
            mixed, key, value = attention.decode(normed, place, self.rope, cache, length[number])
            if image_position is not None:
                heads = attention.num_heads
                query = attention.query(normed, place, self.rope).unflatten(2, (heads, -1)).transpose(1, 2)
                last = length[number][:, None]
                paid = token_score(query, key, last, image_position, self.ranked, attention.scale) * heads
                total = paid if total is None else total + paid
            x = x + mixed
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            caches += [key, value]
        return self.logits(x[:, 0]), *caches, *([] if total is None else [total])


def cache_names(kind: str, layers: int) -> list[str]:
    """Names of cache inputs (`past`) or outputs (`present`), in the order of the graphs."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def stage_outputs(layer: int, counts: Counts, debug: bool, scores: bool) -> list[str]:
    """Names of the prefill graph's outputs from the stage after `layer`."""
    if counts.none:
        return []
    names = [f"kept.{layer}"]
    if debug and scores:
        names += [f"score.{layer}"] + ([f"cluster.{layer}"] if counts.merged else [])
    return names
