"""divprune: the most diverse tokens, whatever they show (DivPrune, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


class DivPrune(VisionMethod):
    """Max-min diversity on the projected embeddings, distance 1 - cosine, greedily.

    First the token whose nearest neighbour is farthest, then always the one farthest from all chosen so far.
    """

    name = "divprune"
    summary = "the most diverse visual tokens, by max-min distance of projected embeddings (DivPrune, CVPR 2025)"
    ranked = False

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        import torch

        from vtexport.pruning.choices import cosine, first_best, marked, places_of, take

        embedded = state.project(state.patches)
        distance = 1 - cosine(embedded, embedded)
        total = distance.shape[1]
        number = torch.arange(total, device=distance.device)
        itself = number == number[:, None]
        chosen = [first_best(distance.masked_fill(itself, torch.inf).amin(dim=2))[:, None]]
        # A token's distance to itself is set to -inf, so that a chosen token is never chosen again.
        spread = distance.new_full((), torch.inf).expand(distance.shape[0], total)
        lowest = torch.where(itself, -torch.inf, distance)
        for _ in range(plan.patch_budget - 1):
            spread = torch.minimum(spread, take(lowest, chosen[-1])[:, 0])
            chosen.append(first_best(spread)[:, None])
        index = places_of(marked(torch.cat(chosen, dim=1), total), plan.patch_budget)
        return Pruned(take(embedded, index), index.to(torch.int32), projected=True)
