"""pyramiddrop: a halving pyramid over the decoder's depth (CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtexport.pruning.decoder import DecoderMethod, Scheduled
from vtexport.pruning.plan import Stage, round_half_up
from vtexport.pruning.schedule import Budget, clamped, every_schedule, layers_of, nearest, parse_layers


@dataclass(frozen=True)
class PyramidDrop(DecoderMethod):
    """Stages after a quarter, half and three quarters of the layers, each of which keeps the same share of its tokens.

    Ranked by the attention of the last prompt token, computed with the next layer's queries and keys. The paper's
    share is 1/2 (mean visual tokens 0.469 V); here it follows from the keep ratio.
    """

    name = "pyramiddrop"
    summary = "a share of the visual tokens leaves after each quarter of the decoder's layers (PyramidDrop, CVPR 2025)"
    scores = True
    attention_of = "next"

    def scheduled(self, budget: Budget) -> Scheduled:
        layers = parse_layers(self.layers, budget.num_layers) if self.layers else _quarters(budget.num_layers)

        def schedule(share: float) -> tuple[Stage, ...]:
            entering = budget.entering
            return clamped(
                layers, entering, lambda number, _tokens: round_half_up(share ** (number + 1) * entering), None
            )

        stages = nearest(every_schedule(schedule, 1.0), budget, self.name, layers)
        return Scheduled(replace(self, layers=layers_of(stages)), stages)


def _quarters(num_layers: int) -> tuple[int, ...]:
    """The layers that end the first three quarters of the decoder, each once."""
    return tuple(sorted({max(0, quarter * num_layers // 4 - 1) for quarter in (1, 2, 3)}))
