"""visionzip: dominant patches as they are, the rest merged into a few contextual ones (VisionZip, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vtexport.options import Meta
from vtexport.pruning.plan import VISION, PruningPlan, Stage, round_half_up, token_budget
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionZip(VisionMethod):
    """`dominant` tokens by the CLS row summed over heads, then `contextual` ones merged from the rest.

    Of the R other tokens, c at stride max(1, R // c) are targets; each of the rest joins the target whose head-mean key
    is nearest by cosine. A contextual token is its target plus the mean of the tokens that joined it. The default share
    of contextual tokens is the authors' 10 of 64 (54 + 10).
    """

    name = "visionzip"
    summary = "the patches CLS attends to most, and a few merged from the rest (VisionZip, CVPR 2025)"
    reads_cls = True
    scores = True
    contextual: Annotated[
        float, Meta(ge=0, lt=1, description="Share of the tokens that are merged from the patches not kept.")
    ] = 0.15625

    def stages(self, tokens: int, keep: float, leading: int) -> tuple[Stage, ...]:
        budget = token_budget(tokens, keep, leading) - leading
        # Merging needs tokens to merge, so there are at most as many contextual tokens as dropped ones.
        contextual = min(round_half_up(budget * self.contextual), budget - 1, tokens - leading - budget)
        return (Stage(VISION, tokens, leading + budget - contextual, contextual),)

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        import torch

        from vtexport.pruning.choices import cosine, first_best, marked, places_of, take
        from vtexport.pruning.ops import token_select

        patches, contextual = state.patches, plan.merged_budget
        dominant = plan.patch_budget - contextual
        score = state.cls_score()
        tokens, index, _ = token_select(patches, score, dominant)
        if contextual == 0:
            return Pruned(tokens, index, score)
        total = patches.shape[1]
        rest = places_of(~marked(index.long(), total), total - dominant)
        stride = max(1, rest.shape[1] // contextual)
        number = torch.arange(rest.shape[1], device=rest.device)
        is_target = (number % stride == 0) & (number < stride * contextual)
        targets = rest[:, : stride * contextual : stride]
        # A sum over heads has the same cosines as the mean.
        key = state.layers[-1].key[:, :, 1:].float().sum(dim=1)
        joined = first_best(cosine(take(key, rest), take(key, targets)))
        members = joined[:, None] == torch.arange(contextual, device=rest.device)[:, None]
        members = (members & ~is_target).to(patches.dtype)
        sums = members @ take(patches, rest)
        mean = sums / members.sum(dim=2, keepdim=True).clamp(min=1)
        return Pruned(torch.cat([tokens, take(patches, targets) + mean], dim=1), index, score)
