"""Every pruning method in plain PyTorch: eager attention maps, one image at a time, loops; written from the papers.

Nothing of `vtexport.pruning` is used. Functions of the vision stage return kept patch indices (ascending) and, if
the method makes tokens, those; `Decoder` runs a whole pruned decoder and decodes token by token with a cache of its
own for each layer, as transformers would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtexport.models import Prompt


def best(values: list[float], count: int) -> list[int]:
    """Places of the `count` greatest values, best first; of equal ones the lower place."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


# --- vision stage ---------------------------------------------------------------------------------------------------


@dataclass
class Tower:
    """What the tower shows of one image: features [1 + V, C], CLS rows a layer [V] (head mean), keys [V, D]."""

    features: Tensor
    rows: list[Tensor]
    keys: Tensor


def tower_of(model, pixels: Tensor) -> Tower:
    """Run transformers' tower on pixels [1, 3, S, S] and read what the methods need up to the feature layer."""
    config, tower = model.config, model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    layer = config.vision_feature_layer
    last = layer - 1 if layer >= 0 else len(layers) + layer
    seen = {}
    hook = layers[last].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: seen.update(keys=out))
    with torch.inference_mode():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    hook.remove()
    heads = config.vision_config.num_attention_heads
    keys = seen["keys"][0].unflatten(1, (heads, -1)).mean(dim=1)[1:]
    rows = [attention[0, :, 0, 1:].mean(dim=0) for attention in out.attentions[: last + 1]]
    return Tower(out.hidden_states[layer][0], rows, keys)


def fastervlm(tower: Tower, count: int) -> list[int]:
    return sorted(best(tower.rows[-1].tolist(), count))


def vtc_cls(tower: Tower, count: int, first: int) -> list[int]:
    return sorted(best(sum(tower.rows[first:]).tolist(), count))


def vispruner(tower: Tower, count: int, ratio: float) -> list[int]:
    patches = tower.features[1:]
    ranked = best(tower.rows[-1].tolist(), len(patches))
    important = int(count * ratio)
    others = ranked[important:]
    while len(others) > count - important:
        drop = min(8, len(others) - (count - important))
        a, b = others[0::2], others[1::2]
        alike = [max(cosine(patches[i], patches[j]) for j in b) for i in a]
        others = [a[place] for place in best(alike, len(a))[drop:]] + b
    return sorted(ranked[:important] + others)


def visionzip(tower: Tower, dominant: int, contextual: int) -> tuple[list[int], Tensor]:
    """Dominant places, and the contextual tokens [c, C] before the projector."""
    patches = tower.features[1:]
    kept = sorted(best(tower.rows[-1].tolist(), dominant))
    rest = [i for i in range(len(patches)) if i not in kept]
    stride = max(1, len(rest) // contextual)
    targets = [rest[number * stride] for number in range(contextual)]
    joined: dict[int, list[Tensor]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            alike = [cosine(tower.keys[i], tower.keys[target]) for target in targets]
            joined[targets[best(alike, 1)[0]]].append(patches[i])
    made = [patches[t] + (torch.stack(joined[t]).mean(dim=0) if joined[t] else 0.0) for t in targets]
    return kept, torch.stack(made)


def divprune(embedded: Tensor, count: int) -> list[int]:
    """On projected embeddings [V, C]."""
    total = len(embedded)
    distance = [[1 - cosine(embedded[i], embedded[j]) for j in range(total)] for i in range(total)]
    nearest = [min(distance[i][j] for j in range(total) if j != i) for i in range(total)]
    chosen = best(nearest, 1)
    while len(chosen) < count:
        spread = [-math.inf if i in chosen else min(distance[i][j] for j in chosen) for i in range(total)]
        chosen += best(spread, 1)
    return sorted(chosen)


# --- decoder stage --------------------------------------------------------------------------------------------------


def raters(visual: Tensor, text: Tensor) -> list[int]:
    """Which of the text tokens [T, C] after the image rate, given visual tokens [V, C]."""
    m = torch.softmax(visual @ text.T, dim=1).mean(dim=0)
    found = [t for t in range(len(text)) if m[t] > m.mean()]
    return found or list(range(len(text)))


@dataclass
class Recycled:
    tokens: Tensor
    centres: list[int]
    members: dict[int, int]


def recycle(hidden: Tensor, score: Tensor, kept: list[int], size: int, count: int, paper: bool = False) -> Recycled:
    """SparseVLM's recycling: the `size` best of the tokens of hidden [V, C] that are not kept become `count`."""
    dropped = [i for i in range(len(hidden)) if i not in kept]
    pool = sorted(dropped[place] for place in best([float(score[i]) for i in dropped], size))
    width = hidden.shape[1]
    distance = {
        (i, j): float(((hidden[i].double() - hidden[j].double()) ** 2).sum().sqrt()) / math.sqrt(width)
        for i in pool
        for j in pool
    }
    # Python's floats hold densities down to e^-745; beyond, only their logarithm tells them apart.
    sparse = {i: sum(sorted(distance[i, j] ** 2 for j in pool)[:count]) / count for i in pool}
    farthest = max(distance.values())
    delta = {}
    for i in pool:
        denser = [j for j in pool if sparse[j] < sparse[i] or (sparse[j] == sparse[i] and j < i)]
        delta[i] = min((distance[i, j] for j in denser), default=farthest)
    peaks = [math.log(delta[i]) - sparse[i] if delta[i] else -math.inf for i in pool]
    centres = [pool[place] for place in sorted(range(len(pool)), key=lambda place: (-peaks[place], place))[:count]]
    members = {}
    for i in pool:
        near = [cosine(hidden[i], hidden[c]) if paper else -distance[i, c] for c in centres]
        members[i] = centres.index(i) if i in centres else best(near, 1)[0]
    tokens = []
    for number in range(count):
        own = [hidden[i] for i in pool if members[i] == number]
        tokens.append(torch.stack(own).sum(dim=0) / (1 if paper else len(own)))
    return Recycled(torch.stack(tokens), centres, members)


@dataclass
class Trace:
    """What a pruned run did: kept indices, scores and clusters by layer, raters among the text after the image."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)
    score: dict[int, Tensor] = field(default_factory=dict)
    clusters: dict[int, dict[int, int]] = field(default_factory=dict)
    raters: list[int] = field(default_factory=list)
    ranking: Tensor | float = 0.0


@dataclass
class Scheme:
    """How a method prunes: `kept` counts by layer, and who scores how.

    `fixed` are by layer how many tokens a plan was made for, of which a row may have fewer, and its pool and clusters.
    """

    kept: dict[int, int]
    rows: str = "raters"
    attention: str = "own"
    plus: bool = False
    given: Tensor | None = None
    recycle: tuple[float, float] | None = None
    paper: bool = False
    positions: str = "compact"
    fixed: dict[int, tuple[int, int, int]] = field(default_factory=dict)


class Decoder:
    """transformers' decoder layers, called one by one on one row, with a cache per layer kept by hand."""

    def __init__(self, model) -> None:
        self.model = model
        self.language = model.model.language_model
        self.text = model.config.text_config
        self.size = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    def generate(self, prompt: Prompt, visual: Tensor | list[Tensor], scheme: Scheme, new_tokens: int) -> Trace:
        """Greedy tokens after `prompt`, its images given as visual [V, C] each."""
        trace = Trace()
        embed = self.model.get_input_embeddings()
        with torch.inference_mode():
            text = embed(torch.tensor(prompt.token_ids))
            images = visual if isinstance(visual, list) else [visual]
            parts, image, before = [], [], 0
            for at, own in zip(prompt.image_positions, images, strict=True):
                parts += [text[before:at], own]
                image += range(at + len(image), at + len(image) + len(own))
                before = at
            visual = torch.cat(images)
            trace.raters = raters(visual, text[before:])
            rows = torch.cat([*parts, text[before:]])
            position = list(range(len(rows)))
            caches: list[tuple[Tensor, Tensor, list[int]]] = []
            for number, layer in enumerate(self.language.layers):
                query, key, value = self._project(layer, rows, position)
                attention = self._attention(query, key)
                caches.append((key, value, list(position)))
                if not scheme.kept:
                    trace.ranking += attention[:, image[-1] + 1 :, image].sum(dim=(0, 1))
                rows = self._finish(layer, rows, attention, value)
                if number in scheme.kept:
                    last = len(rows) - 1
                    rating = [image[-1] + 1 + t for t in trace.raters] if scheme.rows == "raters" else [last]
                    rows, position, image = self._prune(number, scheme, trace, attention, rows, position, image, rating)
            logits = self._logits(rows[-1])
            original = len(prompt.token_ids) + len(visual)
            for step in range(new_tokens):
                token = int(logits.argmax())
                trace.tokens.append(token)
                trace.logits.append(logits)
                if step + 1 == new_tokens:
                    break
                row = embed(torch.tensor([token]))
                for number, layer in enumerate(self.language.layers):
                    old_key, old_value, places = caches[number]
                    place = len(places) if scheme.positions == "compact" else original + step
                    query, key, value = self._project(layer, row, [place])
                    key, value = torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)
                    caches[number] = (key, value, [*places, place])
                    attention = self._attention(query, key)
                    if not scheme.kept:
                        trace.ranking += attention[:, 0, image].sum(dim=0)
                    row = self._finish(layer, row, attention, value)
                logits = self._logits(row[-1])
        return trace

    def _prune(self, number, scheme, trace, attention, rows, position, image, rating):
        if scheme.attention == "next":
            query, key, _ = self._project(self.language.layers[number + 1], rows, position)
            attention = self._attention(query, key)
        visual = attention[:, rating][:, :, image]
        if scheme.plus:
            for r, row in enumerate(rating):
                for v, column in enumerate(image):
                    visual[:, r, v] /= self._ones_product(position[row] - position[column])
            heads = best(visual.sum(dim=(1, 2)).tolist(), math.floor(14 / 32 * len(visual) + 0.5))
            visual = visual[heads]
        score = visual.mean(dim=0).mean(dim=0) if scheme.given is None else scheme.given
        count = min(scheme.kept[number], len(image))
        kept = sorted(best(score.tolist(), count)) if count else []
        trace.kept[number], trace.score[number] = kept, score
        places = [image[i] for i in kept]
        made, made_positions = rows[:0], []
        if scheme.recycle and len(kept) < len(image):
            size = int(scheme.recycle[0] * (len(image) - len(kept))) + 1
            count = int(scheme.recycle[1] * size) + 1
            total, size, count = scheme.fixed.get(number, (len(image), size, count))
            # The last token stands in for those that a row has not; it is picked last.
            padded = image + [image[-1]] * (total - len(image))
            score = torch.cat([score, torch.full((total - len(image),), -math.inf)])
            recycled = recycle(rows[padded], score, kept, size, count, scheme.paper)
            trace.clusters[number] = recycled.members
            made, made_positions = recycled.tokens, [position[padded[c]] for c in recycled.centres]
        dropped = set(image) - set(places)
        before = [i for i in range(image[-1] + 1) if i not in dropped]
        after = list(range(image[-1] + 1, len(rows)))
        shorter = torch.cat([rows[before], made, rows[after]])
        own = [position[i] for i in before] + made_positions + [position[i] for i in after]
        if scheme.positions == "compact":
            own = list(range(len(shorter)))
        left = [number for number, i in enumerate(before) if i in places]
        return shorter, own, left + list(range(len(before), len(before) + len(made)))

    def _ones_product(self, distance: int) -> float:
        """1ᵀ R_distance 1 / √D, by turning two vectors of ones with transformers' own RoPE."""
        ones = torch.ones(1, 1, 2, self.size)
        cos, sin = self.language.rotary_emb(ones, position_ids=torch.tensor([[0, distance]]))
        turned, _ = apply_rotary_pos_emb(ones, ones, cos, sin)
        return float(turned[0, 0, 0] @ turned[0, 0, 1]) / math.sqrt(self.size)

    def _project(self, layer, rows: Tensor, position: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Query [H, S, D], key and value [G, S, D] of rows [S, C], rotated."""
        attention, x = layer.self_attn, layer.input_layernorm(rows)
        query, key, value = (
            part(x).unflatten(1, (-1, self.size)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.language.rotary_emb(rows[None], position_ids=torch.tensor([position]))
        query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
        return query[0], key[0], value

    def _attention(self, query: Tensor, key: Tensor) -> Tensor:
        """The whole causal attention map [H, R, S], every row computed."""
        key = key.repeat_interleave(len(query) // len(key), dim=0)
        logits = query @ key.transpose(1, 2) / math.sqrt(self.size)
        ahead = key.shape[1] - query.shape[1]
        future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(ahead + 1)
        return torch.softmax(logits.masked_fill(future, -math.inf), dim=-1)

    def _finish(self, layer, rows: Tensor, attention: Tensor, value: Tensor) -> Tensor:
        value = value.repeat_interleave(len(attention) // len(value), dim=0)
        mixed = (attention @ value).transpose(0, 1).flatten(1)
        rows = rows + layer.self_attn.o_proj(mixed)
        return rows + layer.mlp(layer.post_attention_layernorm(rows))

    def _logits(self, row: Tensor) -> Tensor:
        return self.model.lm_head(self.language.norm(row)).float()
