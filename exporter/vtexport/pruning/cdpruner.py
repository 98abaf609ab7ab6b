"""cdpruner: tokens that are diverse and relevant to the question at once (CDPruner, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from vtexport.errors import InputError
from vtexport.options import Meta
from vtexport.pruning.extra import Extra
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vtexport.arrays import Array
    from vtexport.models.spec import ModelSpec

# A token adds nothing if the chosen ones leave less than this share of it unexplained. In fp32 such a remainder would
# soon be rounding error, and every runtime would choose differently.
_FLOOR = 1e-3


class QuestionIds(Extra):
    """The question as tokens of CLIP's text tower, [B, L] int64."""

    name = "question_ids"
    graph = "vision"
    dtype = "int64"

    def shape(self, spec: ModelSpec, plan: PruningPlan) -> tuple[int, ...]:
        assert spec.clip is not None, "a build with a method that reads the question has its CLIP"
        return (spec.clip.length,)

    def of_questions(self, processor: Path, spec: ModelSpec) -> Callable[[str], Array]:
        from vtexport.models.clip import FOLDER, ClipTokenizer

        assert spec.clip is not None, "a build with a method that reads the question has its CLIP"
        return ClipTokenizer(processor / FOLDER, spec.clip.length, spec.clip.vocab_size).ids


@dataclass(frozen=True)
class CDPruner(VisionMethod):
    """The greedy most probable subset of a determinantal point process with kernel diag(rel) · S · diag(rel).

    S is the cosine similarity of projected tokens. rel is how *little* a patch agrees with the question in CLIP's
    space, scaled to [0, 1]: the released code negates the cosine, because CLIP's patches agree least where the named
    object stands. Once no token adds to the determinant any more, the most relevant ones follow; the released code
    divides by zero in that case.
    """

    name = "cdpruner"
    summary = "tokens diverse and relevant to the question by CLIP's text tower (CDPruner, NeurIPS 2025)"
    ranked = False
    scores = True
    extras: ClassVar[tuple[Extra, ...]] = (QuestionIds(),)
    adaptive = False
    clip: Annotated[
        str, Meta(description="CLIP checkpoint with its text tower: a folder or a hub id.", extra={"metavar": "MODEL"})
    ] = ""

    @property
    def companion(self) -> str:
        return self.clip

    def settled(self, tower_layers: int) -> CDPruner:
        if not self.clip:
            raise InputError(
                "method cdpruner needs CLIP's text tower, which LLaVA checkpoints do not carry; give the CLIP "
                "checkpoint that its vision tower is from as --clip"
            )
        return self

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        import torch

        from vtexport.pruning.choices import cosine, first_best, marked, places_of, take

        assert state.relevance is not None, "a method that reads the question is given its relevance"
        low, high = (bound(-state.relevance, dim=1, keepdim=True) for bound in (torch.amin, torch.amax))
        relevance = (-state.relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        embedded = state.project(state.patches)
        kernel = relevance[:, :, None] * cosine(embedded, embedded) * relevance[:, None]
        total = kernel.shape[1]
        place = torch.arange(total, device=kernel.device)
        # What every token would add to the determinant: its squared distance to the span of those chosen.
        gain = relevance.square()
        floor = _FLOOR * gain
        taken = gain < -1
        chosen: list[Tensor] = []
        directions: list[Tensor] = []
        for number in range(plan.patch_budget):
            adds = gain > floor
            best = first_best(torch.where(taken, -3.0, torch.where(adds, gain, relevance - 2)))[:, None]
            chosen.append(best)
            taken = taken | (place == best)
            if number + 1 == plan.patch_budget:
                break
            added = torch.where(adds, gain, torch.zeros_like(gain)).gather(1, best)
            direction = take(kernel, best)[:, 0]
            if directions:
                before = torch.stack(directions, dim=1)
                share = before.gather(2, best[:, None].expand(-1, number, -1))
                direction = direction - (share * before).sum(dim=1)
            # A token that adds nothing has no direction outside the span.
            direction = torch.where(added > 0, direction / added.clamp(min=1e-12).sqrt(), torch.zeros_like(direction))
            directions.append(direction)
            gain = gain - direction.square()
        index = places_of(marked(torch.cat(chosen, dim=1), total), plan.patch_budget)
        return Pruned(take(embedded, index), index.to(torch.int32), relevance, projected=True)
