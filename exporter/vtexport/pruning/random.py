"""random: a seeded choice of patches, the baseline a method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from vtexport.options import Meta
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Random(VisionMethod):
    """The same patches of every image, drawn once from `seed` without replacement."""

    name = "random"
    summary = "a seeded random choice of patches, the same for every image (baseline)"
    skips_padding = True
    seed: Annotated[
        int, Meta(ge=0, le=2**32 - 1, description="Seed of the choice: the same seed, the same patches.")
    ] = 0

    def constants(self, plan: PruningPlan, grid: int) -> dict[str, np.ndarray[Any, Any]]:
        # NumPy documents this generator's bit stream as stable: the same seed, the same patches.
        drawn = np.random.default_rng(self.seed).permutation(grid * grid)
        return {"index": np.sort(drawn[: plan.patch_budget]).astype(np.int32)}

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        index = constants["index"]
        tokens = state.patches.index_select(1, index)
        return Pruned(tokens, index.expand(tokens.shape[0], -1))
