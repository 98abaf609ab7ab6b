"""fastervlm: the patches CLS attends to most (arXiv 2412.01818, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vtexport.pruning.base import Pruned, TowerState, VisionMethod
from vtexport.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from torch import Tensor


class FasterVLM(VisionMethod):
    """Top K patches by the [CLS] row of attention in the layer that yields the features, mean over heads."""

    name = "fastervlm"
    summary = "the patches that the vision tower's CLS token attends to most (arXiv 2412.01818)"
    scores = True

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        from vtexport.pruning.ops import token_score, token_select

        patches = state.features[:, 1:]
        # Softmax runs over all 1 + V keys, CLS's own included; only the columns of patches are rated.
        score = token_score(state.query, state.key, 1, state.grid * state.grid, state.scale)
        tokens, index = token_select(patches, score, plan.patch_budget)
        return Pruned(tokens, index, score)
