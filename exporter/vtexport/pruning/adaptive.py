"""`--keep auto` with fixed shapes: a few plans, of which every image gets the smallest that its attention allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.pruning.plan import PruningPlan, check_keep

#: the keep ratio that asks for a choice per image
AUTO = "auto"
DEFAULT_BUCKETS = (0.5, 0.25, 0.125)
DEFAULT_TARGET_ACCURACY = 0.97


@dataclass(frozen=True)
class AdaptiveTable:
    """How often a method left the dense model's greedy answer unchanged, by keep ratio and spread of CLS attention.

    Attributes:
        method: the method, its options at their defaults.
        keeps: keep ratios tried, descending.
        spread: the greatest spread (`vtexport.pruning.ops.spread`) of each bin; bins hold equally many pairs.
        agreement: for each keep ratio, the share of pairs whose answer stayed the same, one value per bin.
    """

    method: str
    keeps: tuple[float, ...]
    spread: tuple[float, ...]
    agreement: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Policy:
    """Which of a bundle's plans an image gets.

    Attributes:
        limits: for each plan but the first, the greatest spread up to which it is enough; never ascending.
        target_accuracy: share of unchanged answers that was asked for.
        accuracy: the share that this policy had at calibration.
    """

    limits: tuple[float, ...]
    target_accuracy: float
    accuracy: float

    def choose(self, spread: Array) -> Array:
        """The number of the plan for each image; spread [B] -> [B] int64. It counts the limits met, which descend."""
        passed: Array = spread[:, None] <= np.array(self.limits)[None]
        return np.asarray(passed.sum(axis=1))


def check_buckets(buckets: Sequence[float]) -> None:
    """Refuse keep ratios that leave nothing to choose from.

    Raises:
        InputError: one is out of range or repeated, or there are fewer than two.
    """
    for keep in buckets:
        check_keep(keep)
    if len(set(buckets)) != len(buckets) or len(buckets) < 2:
        listed = ",".join(f"{keep:g}" for keep in buckets)
        raise InputError(f"--buckets {listed} leaves nothing to choose from; give two or more different keep ratios")


def solve_policy(table: AdaptiveTable, plans: Sequence[PruningPlan], target: float) -> Policy:
    """The policy with the fewest mean visual tokens whose calibrated accuracy reaches `target`.

    Plans with fewer tokens serve bins of smaller spread: attention on few patches means that few patches matter.
    All such assignments of bins to plans are compared.

    Args:
        table: the calibration, with a row for the keep ratio of every plan.
        plans: from most to fewest tokens.
        target: share of unchanged answers, in (0, 1].

    Raises:
        InputError: no policy reaches the target.
    """
    if not (math.isfinite(target) and 0 < target <= 1):
        raise InputError(f"--target-accuracy {target:g} is out of range; give a share above 0 and at most 1")
    bins = len(table.spread)
    rows = [table.agreement[table.keeps.index(plan.keep)] for plan in plans]
    tokens = [plan.mean_visual_tokens for plan in plans]
    best: tuple[float, float, tuple[int, ...]] | None = None
    # cuts[i]: bins that plan i + 1 or a smaller one serves.
    for cuts in itertools.combinations_with_replacement(range(bins, -1, -1), len(plans) - 1):
        number = [sum(place < cut for cut in cuts) for place in range(bins)]
        accuracy = sum(rows[plan][place] for place, plan in enumerate(number)) / bins
        mean = sum(tokens[plan] for plan in number) / bins
        if accuracy >= target - 1e-9 and (best is None or (mean, -accuracy) < best[:2]):
            best = mean, -accuracy, cuts
    if best is None:
        most = sum(rows[0]) / bins
        raise InputError(
            f"--target-accuracy {target:g} is out of reach: at keep {plans[0].keep:g}, the largest bucket, "
            f"{table.method} left {most:.1%} of the calibrated answers as they were; give a larger bucket or a lower "
            "target"
        )
    # A spread lies between 1 and the number of patches, so no image meets a limit of 0, and every image meets `every`.
    every = float(plans[0].num_visual_tokens + 1)
    limits = tuple(0.0 if cut == 0 else every if cut == bins else table.spread[cut - 1] for cut in best[2])
    return Policy(limits, target, round(-best[1], 4))
