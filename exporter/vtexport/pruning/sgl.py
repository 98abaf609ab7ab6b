"""sgl: a small model's attention prunes a large one ("A Stitch in Time Saves Nine", small VLM-guided pruning)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.plan import Option, Stage
from vtexport.pruning.schedule import Budget, default_layers, one_stage, parse_layers


class SGL(DecoderMethod):
    """One stage by a ranking from outside: what another bundle's decoder attended to while it answered.

    That bundle is a dense one of a model with the same visual tokens, built to give out its ranking: attention summed
    over layers, heads and text queries, those of the prompt after the image and of the tokens it generated.
    """

    name = "sgl"
    summary = "the visual tokens that another bundle's model attended to; give it as run --ranking-from"
    raters = "given"
    options: ClassVar[Mapping[str, Option]] = {"layers": "", "positions": "original"}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": ("original", "compact")}

    def stages(self, budget: Budget, options: dict[str, Option]) -> tuple[Stage, ...]:
        asked = str(options["layers"])
        layers = parse_layers(asked, budget.num_layers) if asked else default_layers(budget.num_layers)[:1]
        stages = one_stage(layers, budget, self.name)
        options["layers"] = str(layers[0])
        return stages
