"""dense: no pruning, the yardstick."""

from __future__ import annotations

from collections.abc import Mapping

from vtexport.errors import InputError
from vtexport.pruning.base import VisionMethod
from vtexport.pruning.plan import PruningPlan, token_budget


class Dense(VisionMethod):
    """Every visual token reaches the decoder."""

    name = "dense"
    summary = "no pruning: every visual token reaches the decoder"

    def plan(self, tokens: int, layers: int, keep: float, leading: int, options: Mapping[str, int]) -> PruningPlan:
        if token_budget(tokens, keep, leading) != tokens:
            raise InputError(f"--keep {keep:g} has no effect with method dense; leave it out or give 1")
        return PruningPlan(self.name, 1.0, tokens, layers, leading, (), options)
