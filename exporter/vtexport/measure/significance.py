"""Whether two bundles' scores on the same questions differ by more than chance.

Questions are taken as independent. Several about one image are less so, which makes intervals and p values too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: the two-sided 95% quantile of the normal distribution
_NORMAL_95 = 1.959964
_DRAWS, _SEED = 100_000, 0


@dataclass(frozen=True)
class Comparison:
    """The scores of one bundle minus those of another, over the same questions.

    Attributes:
        difference: of the mean scores.
        low: lower end of its 95% interval.
        high: upper end of its 95% interval.
        better: questions with a higher score here; of scores 0 and 1, those that only this bundle got right.
        worse: questions with a higher score there.
        p: how often chance alone would give a difference as large.
        test: the test that `p` comes from.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    test: str

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport eval --json` prints for it."""
        return asdict(self)


def compare(scores: Sequence[float], others: Sequence[float], *, graded: bool) -> Comparison:
    """Compare scores in [0, 1] of the same questions; `graded` if any may lie between 0 and 1.

    Raises:
        ValueError: different numbers of scores, or none.
    """
    if len(scores) != len(others) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(others)} cannot be paired")
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    low, high = interval(differences.tolist())
    p = sign_flips(differences.tolist()) if graded else mcnemar(better, worse)
    test = f"sign flips, {_DRAWS} draws, seed {_SEED}" if graded else "McNemar, exact"
    return Comparison(float(differences.mean()), low, high, better, worse, p, test)


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p value of McNemar's exact test.

    Args:
        better: questions that only one side got right.
        worse: questions that only the other side got right.

    Returns:
        the chance that a fair coin, thrown `better + worse` times, falls at least as unevenly.
    """
    total = better + worse
    # Terms of the binomial one from another: with huge counts, computing each anew would take minutes.
    term, tail = 1, 0
    for successes in range(min(better, worse) + 1):
        tail += term
        term = term * (total - successes) // (successes + 1)
    return min(1.0, float(2 * tail / 2**total))


def sign_flips(differences: Sequence[float]) -> float:
    """The two-sided p value of the paired permutation test: how often random signs give as large a sum.

    Signs are drawn `_DRAWS` times from a fixed seed, and the p value counts the given signs as one more draw, so it is
    at least 1 / (`_DRAWS` + 1). With differences of -1, 0 and 1 it approaches `mcnemar`.
    """
    # Rounded, so that equal differences are equal in spite of floating point; there are few different ones.
    given = np.round(np.asarray(differences, dtype=np.float64), 9)
    sizes, counts = np.unique(np.abs(given[given != 0]), return_counts=True)
    sums = np.zeros(_DRAWS)
    for size, count, rng in zip(sizes, counts, np.random.default_rng(_SEED).spawn(len(sizes)), strict=True):
        # Of `count` differences of one size, a binomial number keeps its sign.
        sums += size * (2 * rng.binomial(count, 0.5, _DRAWS) - count)
    beyond = int((np.abs(sums) >= abs(given.sum()) - 1e-6).sum())
    return (1 + beyond) / (1 + _DRAWS)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the mean of paired differences in [-1, 1], by Agresti and Min's adjustment of Wald's.

    Half an observation is added to each of the four cells (both right, one, the other, neither), so that few or no
    questions on which two sides differ do not make it too narrow. Agresti and Min, Statistics in Medicine 24 (2005). They
    have scores 0 and 1; other differences enter by their squares in the same way.
    """
    number = len(differences) + 2
    mean = sum(differences) / number
    variance = (sum(one * one for one in differences) + 1) / number - mean * mean
    reach = _NORMAL_95 * math.sqrt(variance / number)
    return max(-1.0, mean - reach), min(1.0, mean + reach)
