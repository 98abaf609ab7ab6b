"""fastervlm: the patches CLS attends to most (arXiv 2412.01818, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


class FasterVLM(VisionMethod):
    """Top K patches by the [CLS] row of attention in the layer that yields the features, mean over heads."""

    name = "fastervlm"
    summary = "the patches that the vision tower's CLS token attends to most (arXiv 2412.01818)"
    reads_cls = True
    skips_padding = True
    scores = True

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        from vtexport.pruning.ops import token_select

        score = state.cls_score()
        tokens, index, _ = token_select(state.patches, score, plan.patch_budget)
        return Pruned(tokens, index, score)
