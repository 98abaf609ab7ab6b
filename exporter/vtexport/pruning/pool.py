"""pool: average pooling on the patch grid, a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vtexport.pruning.plan import VISION, PruningPlan, Stage, token_budget
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


def pool_grid(budget: int, grid: int) -> tuple[int, int]:
    """Rows and columns of the coarse grid: as square as `budget` tokens allow, never more."""
    rows = min(math.isqrt(budget), grid)
    return rows, min(budget // rows, grid)


def _bins(count: int, grid: int) -> np.ndarray[Any, Any]:
    """[count, grid] weights of adaptive average pooling in one dimension (rows sum to 1)."""
    weights = np.zeros((count, grid), dtype=np.float32)
    for i in range(count):
        start, end = i * grid // count, -(-(i + 1) * grid // count)
        weights[i, start:end] = 1.0 / (end - start)
    return weights


class Pool(VisionMethod):
    """Means over the cells of a coarser grid of at most as many cells as the budget; every token is recycled."""

    name = "pool"
    summary = "average pooling on the patch grid (baseline)"

    def stages(self, tokens: int, keep: float, leading: int) -> tuple[Stage, ...]:
        budget = token_budget(tokens, keep, leading) - leading
        rows, columns = pool_grid(budget, math.isqrt(tokens - leading))
        return (Stage(VISION, tokens, leading, rows * columns),)

    def constants(self, plan: PruningPlan, grid: int) -> dict[str, np.ndarray[Any, Any]]:
        rows, columns = pool_grid(plan.patch_budget, grid)
        # One [K, V] matrix instead of a pooling node: exact for any grid, and a plain matmul everywhere.
        return {"weights": np.kron(_bins(rows, grid), _bins(columns, grid))}

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        weights = constants["weights"].to(state.features.dtype)
        return Pruned(weights @ state.patches, None)
