"""A method's name, a keep ratio and options -> a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vtexport.errors import InputError
from vtexport.pruning.adaptive import Policy, solve_policy
from vtexport.pruning.dense import Dense
from vtexport.pruning.plan import Option, PruningPlan, check_keep
from vtexport.pruning.rank import Calibration
from vtexport.pruning.registry import methods_of
from vtexport.pruning.schedule import Budget

if TYPE_CHECKING:
    from vtexport.models.spec import ModelSpec

#: the option of a combination: share of the visual tokens that its vision stage keeps
VISION_KEEP = "vision_keep"


def make_plan(
    method: str,
    *,
    tokens: int,
    layers: int,
    keep: float | None,
    leading: int = 0,
    options: Mapping[str, Option] | None = None,
    calibration: Calibration | None = None,
    reach: int | None = None,
    tower_layers: int | None = None,
) -> PruningPlan:
    """The plan of `method` for an image of `tokens` visual tokens and a decoder of `layers` layers.

    Args:
        method: a key of `METHODS`, or a vision-stage and a decoder-stage method as `a+b`.
        tokens: visual tokens an image before pruning, leading ones included.
        layers: decoder layers.
        keep: mean visual tokens over the decoder's layers as a share of `tokens`, in (0, 1]; None where the options
            decide it (a released schedule, an exit layer).
        leading: tokens before the patches that always stay (CLS under strategy `full`).
        options: the method's own options; those not given have its defaults.
        calibration: measured ranks of this model, for methods whose schedule rests on them.
        reach: the greatest distance that sparsevlm-plus's RoPE weight bears, for that method.
        tower_layers: layers of the vision tower up to the feature layer, for methods that read several.

    Raises:
        InputError: unknown method or option, or a keep ratio out of range or out of reach.
    """
    vision, decoder = methods_of(method)
    resolved = _resolve(method, options or {})
    if keep is not None:
        check_keep(keep)
    if tower_layers is not None:
        vision.resolve(resolved, tower_layers)
    if decoder is None:
        if keep is None:
            raise InputError("--keep is missing; give the share of visual tokens to keep, such as --keep 0.25")
        stages = vision.stages(tokens, keep, leading, resolved)
        return PruningPlan(method, keep, tokens, layers, leading, stages, resolved)
    stages, entering = (), tokens
    if not isinstance(vision, Dense):
        if keep is None:
            raise InputError(f"--keep is missing; method {method} splits it between its two stages")
        # Half of the way, in ratio, before the decoder and half inside, unless told otherwise.
        share = float(resolved.setdefault(VISION_KEEP, round(math.sqrt(keep), 4)))
        if not keep <= share <= 1:
            raise InputError(f"--vision-keep {share:g} is out of range; give a share from --keep ({keep:g}) to 1")
        stages = vision.stages(tokens, share, leading, resolved)
        entering = stages[-1].carried
    if decoder.decides_keep(resolved):
        if keep is not None:
            raise InputError(
                f"--keep has no effect where --{decoder.decides_keep(resolved)} fixes the counts; leave it out"
            )
    elif keep is None:
        raise InputError("--keep is missing; give the share of visual tokens to keep, such as --keep 0.25")
    budget = Budget(
        entering=entering,
        total=tokens,
        num_layers=layers,
        keep=1.0 if keep is None else keep,
        ranks=None if calibration is None else calibration.ranks,
        auto_layers=None if calibration is None else calibration.pruning_layers(1.0 if keep is None else keep),
        exit_layer=None if calibration is None else calibration.exit_layer,
        reach=reach,
    )
    stages += decoder.stages(budget, resolved)
    plan = PruningPlan(method, 0.0 if keep is None else keep, tokens, layers, leading, stages, resolved)
    if keep is not None:
        return plan
    ratio = round(plan.mean_visual_tokens / tokens, 4)
    return PruningPlan(method, ratio, tokens, layers, leading, stages, resolved)


def planner(spec: ModelSpec) -> Callable[..., PruningPlan]:
    """`make_plan` with all that a model's geometry decides; method, keep and options are left to give."""
    from vtexport.models.llava import rope_reach

    v = spec.vision
    return partial(
        make_plan,
        tokens=v.num_visual_tokens,
        layers=spec.decoder.num_layers,
        leading=v.num_visual_tokens - v.num_patches,
        reach=rope_reach(spec),
        tower_layers=v.feature_layer,
    )


def adaptive_plans(
    method: str,
    buckets: Sequence[float],
    target_accuracy: float,
    calibration: Calibration | None,
    options: Mapping[str, Option],
    plan: Callable[[float], PruningPlan],
) -> tuple[list[PruningPlan], Policy]:
    """The plans of `--keep auto`, from most to fewest tokens, and what chooses among them.

    Args:
        method: as `make_plan`'s.
        buckets: keep ratios, descending.
        target_accuracy: see `vtexport.pruning.adaptive.solve_policy`.
        calibration: of this model, with a table for `method`.
        options: the method's own options as given; there may be none, for the calibration is of the defaults.
        plan: `make_plan` with all but the keep ratio.

    Raises:
        InputError: an option, no table for the method or a bucket, or a target out of reach.
    """
    for name in options:
        raise InputError(
            f"--{name.replace('_', '-')} cannot go with --keep auto, whose calibration is of the method's defaults; "
            "leave it out or give a ratio as --keep"
        )
    tables = {} if calibration is None else {table.method: table for table in calibration.adaptive}
    untried = [keep for keep in buckets if method not in tables or keep not in tables[method].keeps]
    if untried:
        listed = ",".join(f"{keep:g}" for keep in buckets)
        raise InputError(
            f"--keep auto needs to know how method {method} does at keep {', '.join(f'{keep:g}' for keep in untried)}, "
            f"which no calibration of this model says; run vtexport calibrate --method {method} --buckets {listed} "
            "and give its file as --ranks"
        )
    plans = [plan(keep) for keep in buckets]
    return plans, solve_policy(tables[method], plans, target_accuracy)


def dense_plan(plan: PruningPlan) -> PruningPlan:
    """The dense plan of the model that `plan` is for."""
    return make_plan(Dense.name, tokens=plan.num_visual_tokens, layers=plan.num_layers, keep=1.0, leading=plan.leading)


def _resolve(method: str, given: Mapping[str, Option]) -> dict[str, Option]:
    """Options of both stages, those not given at their defaults.

    Raises:
        InputError: one that the method does not take, or a word it does not know.
    """
    vision, decoder = methods_of(method)
    chosen = [vision] if decoder is None else [vision, decoder]
    resolved: dict[str, Option] = {}
    choices: dict[str, tuple[str, ...]] = {}
    for part in chosen:
        resolved |= part.options
        choices |= part.choices
    combined = decoder is not None and not isinstance(vision, Dense)
    for name, value in given.items():
        flag = name.replace("_", "-")
        if name not in resolved and not (combined and name == VISION_KEEP):
            raise InputError(f"--{flag} has no effect with method {method}; leave it out")
        if name in choices and value not in choices[name]:
            raise InputError(f"--{flag} {value} is unknown; choose one of {', '.join(choices[name])}")
    if decoder is not None:
        decoder.check_options(given)
    return {**resolved, **given}
