"""vispruner: important patches by CLS attention, and the most dissimilar of the others (VisPruner, ICCV 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vtexport.options import Meta
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor

# The released code drops at most eight tokens per round.
_ROUND = 8


@dataclass(frozen=True)
class VisPruner(VisionMethod):
    """K_imp = int(K * important) patches by the CLS row; the others are thinned of duplicates until K - K_imp remain.

    A round splits the list (at first in order of descending attention) into its even places a and odd places b, and
    drops those of a whose greatest cosine to b is largest. The rest of a, in descending similarity, comes before b. If
    the length is odd, a has one more.
    """

    name = "vispruner"
    summary = "half by CLS attention, half by dissimilarity (VisPruner, ICCV 2025)"
    reads_cls = True
    ranked = False
    scores = True
    important: Annotated[
        float,
        Meta(
            ge=0, le=1, description="Share of the kept tokens that is chosen by attention, the rest by dissimilarity."
        ),
    ] = 0.5

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        import torch

        from vtexport.pruning.choices import cosine, marked, order, places_of, take

        score, patches = state.cls_score(), state.patches
        total, budget = patches.shape[1], plan.patch_budget
        important = int(budget * self.important)
        ranked = order(score)
        alike = cosine(patches, patches)
        others = ranked[:, important:]
        while (surplus := others.shape[1] - (budget - important)) > 0:
            even, odd = others[:, 0::2], others[:, 1::2]
            dropped = min(_ROUND, surplus, even.shape[1])
            if odd.shape[1]:
                rows = take(alike, even).gather(2, odd[:, None].expand(-1, even.shape[1], -1))
                even = even.gather(1, order(rows.amax(dim=2)))
            others = torch.cat([even[:, dropped:], odd], dim=1)
        chosen = torch.cat([ranked[:, :important], others], dim=1)
        index = places_of(marked(chosen, total), budget)
        return Pruned(take(patches, index), index.to(torch.int32), score)
