"""dense: no pruning, the baseline of comparisons."""

from __future__ import annotations

from vtexport.errors import InputError
from vtexport.pruning.plan import Stage, token_budget
from vtexport.pruning.vision import VisionMethod


class Dense(VisionMethod):
    """Every visual token reaches the decoder."""

    name = "dense"
    summary = "no pruning: every visual token reaches the decoder"
    skips_padding = True
    adaptive = False

    def stages(self, tokens: int, keep: float, leading: int) -> tuple[Stage, ...]:
        if token_budget(tokens, keep, leading) != tokens:
            raise InputError(f"--keep {keep:g} has no effect with method dense; leave it out or give 1")
        return ()
