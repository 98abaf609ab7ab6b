"""dense: no pruning, the yardstick."""

from __future__ import annotations

from collections.abc import Mapping

from vtexport.errors import InputError
from vtexport.pruning.plan import Option, Stage, token_budget
from vtexport.pruning.vision import VisionMethod


class Dense(VisionMethod):
    """Every visual token reaches the decoder."""

    name = "dense"
    summary = "no pruning: every visual token reaches the decoder"
    skips_padding = True

    def stages(self, tokens: int, keep: float, leading: int, options: Mapping[str, Option]) -> tuple[Stage, ...]:
        if token_budget(tokens, keep, leading) != tokens:
            raise InputError(f"--keep {keep:g} has no effect with method dense; leave it out or give 1")
        return ()
