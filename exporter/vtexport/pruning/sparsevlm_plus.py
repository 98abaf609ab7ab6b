"""sparsevlm-plus: SparseVLM's released version 2.0 ("SparseVLM+"), without recycling, corrected for RoPE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.pruning.decoder import Attention
from vtexport.pruning.layout import Layout
from vtexport.pruning.plan import Option, Stage, round_half_up
from vtexport.pruning.schedule import Budget, Recycling
from vtexport.pruning.sparsevlm import SparseVLM

if TYPE_CHECKING:
    from torch import Tensor

# The released code averages 14 of 32 heads.
_HEADS, _OF = 14, 32


class SparseVLMPlus(SparseVLM):
    """SparseVLM's raters; attention divided by what RoPE alone gives a distance, over the heads that see the image.

    The divisor at distance d is (1ᵀ R_d 1) / √D, the product of two vectors of ones after RoPE. It turns negative
    beyond a distance of its own (`rope_reach`), so geometries and prompts that reach it are refused.
    """

    name = "sparsevlm-plus"
    summary = "sparsevlm with RoPE's distance taken out of the scores, no recycling (SparseVLM's released v2.0)"
    options: ClassVar[Mapping[str, Option]] = {
        "layers": "",
        "positions": "original",
        "rule": "rank",
        "schedule": "",
        "reach": 0,
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "positions": ("original",),
        "rule": ("rank", "proportional"),
    }

    def stages(self, budget: Budget, options: dict[str, Option]) -> tuple[Stage, ...]:
        if budget.reach is not None:
            if budget.entering >= budget.reach:
                raise InputError(
                    f"method {self.name} weighs distances below {budget.reach} positions only, and {budget.entering} "
                    "visual tokens enter this decoder; use sparsevlm, or combine with a vision-stage method"
                )
            options["reach"] = budget.reach
        return super().stages(budget, options)

    def recycling(self, options: Mapping[str, Option]) -> Recycling | None:
        return None

    def score(self, attention: Attention, layout: Layout) -> Tensor:
        import torch

        from vtexport.pruning.ops import token_score_heads

        query, key = attention.split()
        size = query.shape[3]
        weight = 2 * attention.cos.float().sum(dim=1) / math.sqrt(size)
        rows = attention.positions.gather(1, attention.places)
        columns = layout.visual_of(attention.positions[..., None])[..., 0]
        # Rows before the image rate nothing; their distance must only stay inside the table.
        distance = (rows[:, :, None] - columns[:, None]).clamp(min=0)
        divisor, present = weight[distance], layout.present()
        if present is not None:
            # A token that a row has not is paid nothing, so that it has no say in which heads count.
            divisor = divisor.masked_fill(~present[:, None], torch.inf)
        return token_score_heads(
            query,
            key,
            attention.rows,
            attention.places,
            layout.image_position[:, 0],
            divisor,
            layout.visual,
            attention.scale,
            round_half_up(_HEADS / _OF * attention.heads),
        )
