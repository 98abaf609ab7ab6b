"""fastv: what the last prompt token attends to in an early layer (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtexport.pruning.decoder import DecoderMethod, Positions, Scheduled
from vtexport.pruning.schedule import Budget, listed, one_stage, parse_layers


@dataclass(frozen=True)
class FastV(DecoderMethod):
    """One stage: the top tokens by the last prompt token's attention, original positions.

    The paper prunes at the input of layer K by the attention of layer K - 1, K = 2: here that is a stage after layer
    1. The layers up to there keep their whole KV cache. The paper's R is the share dropped at that stage.
    """

    name = "fastv"
    summary = "the visual tokens that the last prompt token attends to in an early layer (arXiv 2403.06764)"
    scores = True
    positions: Positions = "original"

    def scheduled(self, budget: Budget) -> Scheduled:
        layers = parse_layers(self.layers or "1", budget.num_layers)
        return Scheduled(replace(self, layers=listed(layers)), one_stage(layers, budget, self.name))
