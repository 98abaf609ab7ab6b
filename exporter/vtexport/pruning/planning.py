"""Makes a plan from a method, a keep ratio and a model's geometry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vtexport.errors import InputError
from vtexport.options import flag_of
from vtexport.pruning.adaptive import Policy, solve_policy
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.dense import Dense
from vtexport.pruning.geometry import Geometry
from vtexport.pruning.method import Combination, MethodChoice
from vtexport.pruning.plan import VISION, PruningPlan, Stage, check_keep, round_half_up
from vtexport.pruning.registry import choose
from vtexport.pruning.schedule import Budget
from vtexport.pruning.vision import VisionMethod

_KEEP_MISSING = "--keep is missing; give the share of visual tokens to keep, such as --keep 0.25"


def make_plan(
    method: str,
    geometry: Geometry,
    *,
    keep: float | None = None,
    options: Mapping[str, object] | None = None,
    calibration: Calibration | None = None,
) -> PruningPlan:
    """The plan of `method` for a model.

    Args:
        method: a key of `METHODS`, or a vision-stage and a decoder-stage method as `a+b`.
        geometry: of the model.
        keep: mean visual tokens over the decoder's layers as a share of all, in (0, 1]; None for `dense`, and where
            options fix it (a released schedule, an exit layer).
        options: the method's own options; those not given have its defaults.
        calibration: of this model, for methods whose schedule rests on one.

    Raises:
        InputError: unknown method or option, one that this model does not allow, or a keep ratio out of range or reach.
    """
    methods = choose(method, options or {})
    if geometry.model is not None:
        for part in methods.parts:
            part.check_model(geometry.model)
    if keep is not None:
        check_keep(keep)
    if methods.decoder is None:
        keep = 1.0 if keep is None and isinstance(methods.vision, Dense) else keep
        if keep is None:
            raise InputError(_KEEP_MISSING)
        vision, stages = _vision_part(methods.vision, geometry, keep)
        return _plan(replace(methods, vision=vision), geometry, keep, stages)
    return _decoder_plan(methods, geometry, keep, calibration)


def _decoder_plan(
    methods: MethodChoice, geometry: Geometry, keep: float | None, calibration: Calibration | None
) -> PruningPlan:
    """The plan of a decoder-stage method, alone or behind a vision-stage method."""
    decoder, stages = methods.decoder, tuple[Stage, ...]()
    assert decoder is not None
    if methods.combination is not None:
        methods, stages = _before_the_decoder(methods, methods.combination, geometry, keep)
    if decoder.fixes_keep:
        if keep is not None:
            raise InputError(f"--keep has no effect where --{decoder.fixes_keep} fixes the counts; leave it out")
    elif keep is None:
        raise InputError(_KEEP_MISSING)
    entering = stages[-1].carried if stages else geometry.tokens
    scheduled = decoder.scheduled(Budget(entering, geometry, 1.0 if keep is None else keep, calibration))
    plan = _plan(replace(methods, decoder=scheduled.method), geometry, keep or 0.0, stages + scheduled.stages)
    return plan if keep is not None else replace(plan, keep=round(plan.mean_visual_tokens / geometry.tokens, 4))


def _before_the_decoder(
    methods: MethodChoice, combination: Combination, geometry: Geometry, keep: float | None
) -> tuple[MethodChoice, tuple[Stage, ...]]:
    """The vision stage of a combination, which keeps `vision_keep`: by default the square root of the keep ratio."""
    if keep is None:
        raise InputError(f"--keep is missing; method {methods.name} splits it between its two stages")
    share = combination.vision_keep
    share = round(math.sqrt(keep), 4) if share is None else share
    if not keep <= share <= 1:
        raise InputError(f"--vision-keep {share:g} is out of range; give a share from --keep ({keep:g}) to 1")
    vision, stages = _vision_part(methods.vision, geometry, share)
    return replace(methods, vision=vision, combination=Combination(share)), stages


def _plan(methods: MethodChoice, geometry: Geometry, keep: float, stages: tuple[Stage, ...]) -> PruningPlan:
    return PruningPlan(
        methods,
        keep,
        geometry.tokens,
        geometry.layers,
        leading=geometry.leading,
        stages=stages,
        views=geometry.views,
        newlines=geometry.newlines,
    )


def _vision_part(method: VisionMethod, geometry: Geometry, keep: float) -> tuple[VisionMethod, tuple[Stage, ...]]:
    """`method` settled, and its stage: after newlines are counted, every view gets an equal share of the budget.

    Raises:
        InputError: nothing is left for the views.
    """
    if geometry.tower_layers is not None:
        method = method.settled(geometry.tower_layers)
    if geometry.views == 1 and not geometry.newlines:
        return method, method.stages(geometry.tokens, keep, geometry.leading)
    views, newlines, leading = geometry.views, geometry.newlines, geometry.leading
    each = (geometry.tokens - newlines) // views
    share = (round_half_up(keep * geometry.tokens) - newlines) // views
    if share < leading + 1:
        least = (newlines + views * (leading + 1)) / geometry.tokens
        raise InputError(
            f"--keep {keep:g} leaves no token for each of {views} views of {each}; the least for this model is about "
            f"{least:.2g}"
        )
    return method, tuple(
        Stage(VISION, geometry.tokens, views * stage.kept + newlines, views * stage.recycled)
        for stage in method.stages(each, share / each, leading)
    )


def adaptive_plans(
    method: str,
    buckets: Sequence[float],
    target_accuracy: float,
    calibration: Calibration | None,
    options: Mapping[str, object],
    plan: Callable[[float], PruningPlan],
) -> tuple[list[PruningPlan], Policy]:
    """The plans of `--keep auto`, from most to fewest tokens, and the policy that chooses among them.

    Args:
        method: as in `make_plan`.
        buckets: keep ratios, descending.
        target_accuracy: see `vtexport.pruning.adaptive.solve_policy`.
        calibration: of this model, with a table for `method`.
        options: the method's own options as given; must be empty, because the calibration was made with the defaults.
        plan: `make_plan` with all but the keep ratio.

    Raises:
        InputError: an option was given, the calibration lacks the method or a bucket, or the target is out of reach.
    """
    for name in options:
        raise InputError(
            f"{flag_of(name)} cannot go with --keep auto, whose calibration is of the method's defaults; "
            "leave it out or give a ratio as --keep"
        )
    tables = {} if calibration is None else {table.method: table for table in calibration.adaptive}
    untried = [keep for keep in buckets if method not in tables or keep not in tables[method].keeps]
    if untried:
        listed = ",".join(f"{keep:g}" for keep in buckets)
        raise InputError(
            f"--keep auto needs to know how method {method} does at keep {', '.join(f'{keep:g}' for keep in untried)}, "
            f"which no calibration of this model says; run vtexport calibrate --method {method} --buckets {listed} "
            "and give its file as --calibration"
        )
    plans = [plan(keep) for keep in buckets]
    return plans, solve_policy(tables[method], plans, target_accuracy)


def dense_plan(plan: PruningPlan) -> PruningPlan:
    """The dense plan of the model that `plan` is for."""
    return replace(plan, methods=MethodChoice(Dense()), keep=1.0, stages=())
