"""The FLOPs of a plan, computed from sizes alone: 2 per multiply-add, attention included."""

from __future__ import annotations

from dataclasses import dataclass

from vtexport.models.spec import DecoderSpec, ModelSpec
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.selection import rating_layer

#: text tokens that are assumed where there is no prompt
NOMINAL_TEXT_TOKENS = 64


@dataclass(frozen=True)
class Flops:
    """FLOPs of one prompt with its images.

    Attributes:
        vision: tower up to the feature layer, scoring, and projector on the kept tokens.
        prefill: the decoder over visual and text tokens, scoring at its stages, and the head on the last token.
        decode: one further token.
    """

    vision: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Vision and prefill together."""
        return self.vision + self.prefill


def plan_flops(spec: ModelSpec, plan: PruningPlan, text_tokens: int = NOMINAL_TEXT_TOKENS) -> Flops:
    """FLOPs of `plan` on `spec` for a prompt of `text_tokens` tokens beside the image.

    Attention is counted over full rows (2n²·width multiply-adds per layer), as in the papers (SparseVLM, section 3.4).
    """
    layers = [_layer(spec.decoder, n + text_tokens, n + text_tokens) for n in plan.per_layer]
    step = [_layer(spec.decoder, 1, n + text_tokens + 1) for n in plan.per_layer]
    head = 2 * spec.decoder.hidden_size * spec.decoder.vocab_size
    rating = _rating(spec.decoder, plan, text_tokens)
    return Flops(_vision(spec, plan), float(sum(layers) + rating + head), float(sum(step) + head))


def selection_flops(spec: ModelSpec, plan: PruningPlan, text_tokens: int = NOMINAL_TEXT_TOKENS) -> float:
    """FLOPs of choosing visual tokens by a plan of `selection_plan`, without the decoder that then sees them.

    The layers before the one that rates, the scoring, and of that one the queries of the rating rows and all keys.
    """
    d, method = spec.decoder, plan.methods.decoder
    assert method is not None, "a plan that chooses has a decoder-stage method"
    keys = plan.vision_tokens + text_tokens
    raters = text_tokens if method.raters == "text" else 1
    projected = 2 * d.hidden_size * d.head_size * (raters * d.num_heads + keys * d.num_kv_heads)
    return float(rating_layer(plan) * _layer(d, keys, keys) + projected + _rating(d, plan, text_tokens))


def _rating(d: DecoderSpec, plan: PruningPlan, text_tokens: int) -> int:
    """FLOPs of scoring: the queries of the rating rows against all keys, at every decoder stage."""
    method = plan.methods.decoder
    if method is None or not method.scores:
        return 0
    rows = text_tokens if method.raters == "text" else 1
    keys = sum(stage.tokens_in + text_tokens for stage in plan.decoder_stages.values())
    return 2 * rows * keys * d.num_heads * d.head_size


def _layer(d: DecoderSpec, rows: int, keys: int) -> int:
    heads = d.num_heads * d.head_size
    weights = d.hidden_size * (2 * heads + 2 * d.num_kv_heads * d.head_size)
    weights += 3 * d.hidden_size * d.intermediate_size
    return 2 * rows * weights + 2 * 2 * rows * keys * heads


def _vision(spec: ModelSpec, plan: PruningPlan) -> float:
    v, width = spec.vision, spec.decoder.hidden_size
    rows = v.num_patches + v.class_token
    patches = 2 * v.num_patches * v.channels * v.patch_size**2 * v.hidden_size
    weights = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    layer = 2 * rows * weights + 2 * 2 * rows * rows * v.hidden_size
    scoring = 2 * rows * v.hidden_size if plan.methods.vision.scores else 0
    projector = 2 * plan.vision_tokens * (v.hidden_size * width + width * width)
    question = 0
    if plan.methods.vision.companion and spec.clip is not None:
        each = 2 * v.num_patches * (v.hidden_size * spec.clip.projection + v.num_patches * width)
        question = spec.clip.flops() + spec.views.total * each
    return float(spec.views.total * (patches + v.feature_layer * layer + scoring) + projector + question)
