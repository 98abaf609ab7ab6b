"""fastv: what the last prompt token attends to in an early layer (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.plan import Option, Stage
from vtexport.pruning.schedule import Budget, one_stage, parse_layers


class FastV(DecoderMethod):
    """One stage: the top tokens by the last prompt token's attention, original positions.

    The paper prunes at the input of layer K by the attention of layer K - 1, K = 2: here that is a stage after layer
    1. The layers up to there keep their whole KV cache. The paper's R is the share dropped at that stage.
    """

    name = "fastv"
    summary = "the visual tokens that the last prompt token attends to in an early layer (arXiv 2403.06764)"
    scores = True
    options: ClassVar[Mapping[str, Option]] = {"layers": "", "positions": "original"}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": ("original", "compact")}

    def stages(self, budget: Budget, options: dict[str, Option]) -> tuple[Stage, ...]:
        layers = parse_layers(str(options["layers"] or 1), budget.num_layers)
        stages = one_stage(layers, budget, self.name)
        options["layers"] = str(layers[0])
        return stages
