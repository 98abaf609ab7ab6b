"""Finds rows of a batch whose numbers are none, from which an answer would be chosen as if they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import NumericError
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.runtime.request import Embedded, Result
from vtexport.targets.engine import PrefillOutput, VisionOutput

_NONE = "NaN or infinity"


def finite_rows(array: Array) -> Array:
    """Whether all numbers of each row of array [B, …] are finite, [B] bool."""
    return np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))


def prefill_faults(
    plan: PruningPlan,
    vision: VisionOutput,
    bucket: int,
    lengths: Array,
    prefilled: PrefillOutput,
    results: list[Result],
) -> list[str]:
    """What is wrong with each row after prefill, named by the earliest stage that shows it; "" where nothing is.

    Args:
        plan: plan number `bucket`.
        vision: what the vision graph gave.
        bucket: the number of the plan.
        lengths: visual tokens of each row behind the vision stage, [B] int64.
        prefilled: what prefill gave.
        results: what both say of each row, by stage.
    """
    visual: Any = vision.seen(bucket).visual
    spread = vision.arrays.get("spread")
    right = finite_rows(prefilled.logits)
    faults = []
    for row, result in enumerate(results):
        # What an engine left on its device comes here only if something is wrong.
        here = isinstance(visual, np.ndarray) or not right[row]
        seen = not here or bool(np.isfinite(np.asarray(visual[row])[: lengths[row]]).all())
        if not seen or (spread is not None and not np.isfinite(spread[row])):
            faults.append(f"the vision stage gave {_NONE}")
        else:
            faults.append(_fault(plan, prefilled, row, result, bool(right[row])))
    return faults


def _fault(plan: PruningPlan, prefilled: PrefillOutput, row: int, result: Result, right: bool) -> str:
    """What is wrong with a row behind the vision stage, whose logits are all numbers if `right`."""
    for stage in plan.stages:
        score, kept = result.debug.get(f"score.{stage.where}"), result.kept.get(stage.where)
        place = "the vision stage" if stage.where == VISION else f"the pruning stage at {stage.where}"
        # A place without a token, as the padding of tiles, scores minus infinity.
        if score is not None and not (score < np.inf).all():
            return f"the scores of {place} are {_NONE}"
        # Tokens that repeat, run backwards or are not there: a kernel or a driver is broken.
        if kept is not None and len(kept) and not ((np.diff(kept) > 0).all() and kept[-1] < stage.tokens_in):
            return f"{place} kept tokens out of range or order"
    if right:
        return ""
    layer = prefilled.cache.broken_layer(row)
    return f"prefill gave {_NONE}" + ("" if layer is None else f", at the latest from decoder layer {layer} on")


def step_faults(logits: Array, steps: Array) -> list[str]:
    """What is wrong with each row after a decode step; "" where nothing is.

    Args:
        logits: [B, vocabulary].
        steps: [B] int64, the number of each row's step.
    """
    return [
        "" if right else f"decode step {step} gave {_NONE}"
        for right, step in zip(finite_rows(logits), steps, strict=True)
    ]


def checked(embedded: list[Embedded]) -> list[Embedded]:
    """The same, if all visual tokens are numbers.

    Raises:
        NumericError: some are none.
    """
    for row, one in enumerate(embedded):
        if not all(np.isfinite(tokens).all() for tokens in one.images):
            raise NumericError(f"the vision stage gave {_NONE}", row)
    return embedded


def check_rows(faults: Sequence[str], rows: Array, numbers: Array) -> None:
    """Refuse a batch of which one of `rows` has a fault.

    Args:
        faults: by row.
        rows: the rows that count.
        numbers: the number of each row's request in what was asked together.

    Raises:
        NumericError: one has.
    """
    for row in rows:
        if faults[row]:
            raise NumericError(faults[row], int(numbers[row]))
