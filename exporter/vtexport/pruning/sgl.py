"""sgl: a small model's attention prunes a large one ("A Stitch in Time Saves Nine", small VLM-guided pruning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.pruning.decoder import DecoderMethod, Positions, Scheduled
from vtexport.pruning.extra import Extra
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.schedule import Budget, default_layers, listed, one_stage, parse_layers

if TYPE_CHECKING:
    from torch import Tensor

    from vtexport.models.spec import ModelSpec


class Ranking(Extra):
    """How much another bundle's model attended to each visual token that enters the stage, [B, V] fp32."""

    name = "ranking"
    graph = "prefill"
    dtype = "float32"

    def shape(self, spec: ModelSpec, plan: PruningPlan) -> tuple[int, ...]:
        (stage,) = plan.decoder_stages.values()
        return (stage.tokens_in,)


@dataclass(frozen=True)
class SGL(DecoderMethod):
    """One stage by a ranking from outside: how much another bundle's decoder attended to each token while it answered.

    That bundle holds a dense model with the same visual tokens, and is built to give out its ranking: attention summed
    over layers, heads and text queries, which are the prompt's tokens after the image and the generated tokens.
    """

    name = "sgl"
    summary = "the visual tokens that another bundle's model attended to; give it as run --ranking-from"
    raters = "none"
    extras: ClassVar[tuple[Extra, ...]] = (Ranking(),)
    adaptive = False
    positions: Positions = "original"

    @classmethod
    def check_model(cls, spec: ModelSpec) -> None:
        if spec.views.counted:
            raise InputError(f"method {cls.name} ranks the tokens of one image of one size; use another method")

    def scheduled(self, budget: Budget) -> Scheduled:
        first = default_layers(budget.num_layers)[:1]
        layers = parse_layers(self.layers, budget.num_layers) if self.layers else first
        return Scheduled(replace(self, layers=listed(layers)), one_stage(layers, budget, self.name))

    def given_score(self, extras: Mapping[str, Tensor]) -> Tensor:
        return extras[Ranking.name]
