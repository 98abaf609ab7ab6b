"""The whole language model as one graph, whose weights therefore exist once: prefill and decode, for all plans."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtexport.graph.graphs import Before, PrefillGraph, cache_names
from vtexport.graph.tracing import Extent
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import Counts, slots, stage_layers


class LanguageGraph(PrefillGraph):
    """New tokens per row behind its caches: a whole prompt with its image behind empty ones, or one token and no image.

    Every number of visual tokens is dynamic: V of the image, 0 without one, and those that stages keep, pool and merge,
    which each plan sets by the lengths of inputs that have no other content (`slots`).

    Inputs: those of `PrefillGraph`, with visual [B, V, C]; length and position as `DecodeGraph` has them, position being
    that of the first new token; per layer the caches key, value [B, G, M_i, D], whose capacity M_i is static; slots.
    Outputs: those of `PrefillGraph`, with the caches in place of their new entries.
    """

    def __init__(
        self, spec: ModelSpec, plans: Sequence[PruningPlan], debug: bool = False, gives_ranking: bool = False
    ) -> None:
        super().__init__(spec, plans[0], debug, gives_ranking)
        dynamic = {name: Extent.named(name) for name in slots(plans, plans[0])}
        self.counts = {
            layer: Counts(*(dynamic.get(f"slots.{part}.{layer}", 0) for part in ("kept", "pool", "merged")))
            for layer in stage_layers(plans)
        }

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.input_names(), inputs, strict=True))
        caches = [given[name] for name in cache_names("past", self.plan.num_layers)]
        return self.run(given, Before(caches, given["length"], given["position"]))

    def input_names(self) -> list[str]:
        named = [str(count) for counts in self.counts.values() for count in vars(counts).values() if count]
        return [*super().input_names(), "length", "position", *cache_names("past", self.plan.num_layers), *named]
