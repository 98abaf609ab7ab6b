"""sparsevlm-plus: SparseVLM's released version 2.0 ("SparseVLM+"), without recycling, corrected for RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from vtexport.errors import InputError
from vtexport.models.rope import rope_tables
from vtexport.models.spec import ModelSpec
from vtexport.options import Meta
from vtexport.pruning.decoder import Attention, OnlyOriginalPositions, Scheduled
from vtexport.pruning.layout import Layout
from vtexport.pruning.plan import round_half_up
from vtexport.pruning.schedule import Budget
from vtexport.pruning.sparsevlm import TextGuided

if TYPE_CHECKING:
    from torch import Tensor

# The released code averages 14 of 32 heads.
_HEADS, _OF = 14, 32


def rope_reach(spec: ModelSpec) -> int:
    """The first distance at which RoPE, applied to two vectors of ones, yields no positive product.

    `max_positions` if the product is positive at every distance.
    """
    cos, _ = rope_tables(spec)
    negative = (cos.sum(dim=1) <= 0).nonzero()
    return int(negative[0]) if len(negative) else spec.decoder.max_positions


@dataclass(frozen=True)
class SparseVLMPlus(TextGuided):
    """SparseVLM's raters; attention is divided by RoPE's weight of a distance, over the heads that attend to the image.

    The divisor at distance d is (1ᵀ R_d 1) / √D, the product of two vectors of ones after RoPE. It stops being positive
    at a distance that depends on the model (`rope_reach`), so geometries and prompts that reach it are refused.
    """

    name = "sparsevlm-plus"
    summary = "sparsevlm with RoPE's distance taken out of the scores, no recycling (SparseVLM's released v2.0)"
    positions: OnlyOriginalPositions = "original"
    reach: Annotated[
        int, Meta(description="First distance at which RoPE's weight is not positive.", extra={"resolved": True})
    ] = 0

    def scheduled(self, budget: Budget) -> Scheduled:
        if budget.geometry.model is None:
            return super().scheduled(budget)
        reach = rope_reach(budget.geometry.model)
        if budget.entering >= reach:
            raise InputError(
                f"method {self.name} weighs distances below {reach} positions only, and {budget.entering} visual "
                "tokens enter this decoder; use sparsevlm, or combine with a vision-stage method"
            )
        return super(SparseVLMPlus, replace(self, reach=reach)).scheduled(budget)

    def check_prompt(self, reach: int) -> None:
        if self.reach and reach >= self.reach:
            raise InputError(
                f"the prompt's end lies {reach} positions behind the image's first token, and method {self.name} "
                f"weighs distances below {self.reach} only; shorten the prompt"
            )

    def score(self, attention: Attention, layout: Layout) -> Tensor:
        import torch

        from vtexport.pruning.ops import token_score_heads

        query, key = attention.split()
        size = query.shape[3]
        weight = 2 * attention.cos.float().sum(dim=1) / math.sqrt(size)
        # Rows that do not count have no place; any of theirs will do.
        rows = attention.positions.gather(1, attention.places.clamp(min=0))
        columns = layout.visual_of(attention.positions[..., None])[..., 0]
        # Rows before the image rate nothing; their distance only has to stay inside the table.
        distance = (rows[:, :, None] - columns[:, None]).clamp(min=0)
        divisor, present = weight[distance], layout.present()
        if present is not None:
            # A token that a row does not have gets no attention, so that it does not affect which heads count.
            divisor = divisor.masked_fill(~present[:, None], torch.inf)
        return token_score_heads(
            query,
            key,
            attention.places,
            layout.image_position[:, 0],
            divisor,
            layout.visual,
            attention.scale,
            round_half_up(_HEADS / _OF * attention.heads),
        )
