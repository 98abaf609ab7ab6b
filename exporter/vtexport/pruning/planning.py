"""A method's name, a keep ratio and options -> a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vtexport.errors import InputError
from vtexport.pruning.adaptive import Policy, solve_policy
from vtexport.pruning.dense import Dense
from vtexport.pruning.plan import VISION, Option, PruningPlan, Stage, check_keep, round_half_up
from vtexport.pruning.rank import Calibration
from vtexport.pruning.registry import methods_of
from vtexport.pruning.schedule import Budget
from vtexport.pruning.vision import VisionMethod

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
    views: int = 1,
    newlines: int = 0,
) -> PruningPlan:
    """The plan of `method` for an image of `tokens` visual tokens and a decoder of `layers` layers.

    Args:
        method: a key of `METHODS`, or a vision-stage and a decoder-stage method as `a+b`.
        tokens: visual tokens a prompt before pruning, leading ones and newlines included.
        layers: decoder layers.
        keep: mean visual tokens over the decoder's layers as a share of `tokens`, in (0, 1]; None where the options
            decide it (a released schedule, an exit layer).
        leading: tokens before a view's patches that always stay (CLS under strategy `full`).
        options: the method's own options; those not given have its defaults.
        calibration: measured ranks of this model, for methods whose schedule rests on them.
        reach: the greatest distance that sparsevlm-plus's RoPE weight bears, for that method.
        tower_layers: layers of the vision tower up to the feature layer, for methods that read several.
        views: views a prompt.
        newlines: newline tokens a prompt at most.

    Raises:
        InputError: unknown method or option, or a keep ratio out of range or out of reach.
    """
    vision, decoder = methods_of(method)
    resolved = _resolve(method, options or {})
    if keep is not None:
        check_keep(keep)
    if tower_layers is not None:
        vision.resolve(resolved, tower_layers)
    shape = _Shape(tokens, leading, views, newlines)
    if decoder is None:
        if keep is None:
            raise InputError("--keep is missing; give the share of visual tokens to keep, such as --keep 0.25")
        stages = _vision_stages(vision, shape, keep, resolved)
        return PruningPlan(method, keep, tokens, layers, leading, stages, resolved, views, newlines)
    stages, entering = (), tokens
    if not isinstance(vision, Dense):
        if keep is None:
            raise InputError(f"--keep is missing; method {method} splits it between its two stages")
        # Half of the way, in ratio, before the decoder and half inside, unless told otherwise.
        share = float(resolved.setdefault(VISION_KEEP, round(math.sqrt(keep), 4)))
        if not keep <= share <= 1:
            raise InputError(f"--vision-keep {share:g} is out of range; give a share from --keep ({keep:g}) to 1")
        stages = _vision_stages(vision, shape, share, resolved)
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
    plan = PruningPlan(method, keep or 0.0, tokens, layers, leading, stages, resolved, views, newlines)
    return plan if keep is not None else replace(plan, keep=round(plan.mean_visual_tokens / tokens, 4))


@dataclass(frozen=True)
class _Shape:
    """What a vision stage prunes: see `make_plan`."""

    tokens: int
    leading: int
    views: int
    newlines: int


def _vision_stages(
    method: VisionMethod, shape: _Shape, keep: float, options: Mapping[str, Option]
) -> tuple[Stage, ...]:
    """The stage of `method`: every view gets an equal share of the budget, once newlines have theirs.

    Raises:
        InputError: nothing is left for the views.
    """
    if shape.views == 1 and not shape.newlines:
        return method.stages(shape.tokens, keep, shape.leading, options)
    each = (shape.tokens - shape.newlines) // shape.views
    share = (round_half_up(keep * shape.tokens) - shape.newlines) // shape.views
    if share < shape.leading + 1:
        least = (shape.newlines + shape.views * (shape.leading + 1)) / shape.tokens
        raise InputError(
            f"--keep {keep:g} leaves no token for each of {shape.views} views of {each}; the least for this model is about "
            f"{least:.2g}"
        )
    return tuple(
        Stage(VISION, shape.tokens, shape.views * one.kept + shape.newlines, shape.views * one.recycled)
        for one in method.stages(each, share / each, shape.leading, options)
    )


def planner(spec: ModelSpec) -> Callable[..., PruningPlan]:
    """`make_plan` with all that a model's geometry decides; method, keep and options are left to give.

    It raises InputError for a method that this model's tower or sequence does not allow.
    """
    from vtexport.models.rope import rope_reach

    make = partial(
        make_plan,
        tokens=spec.num_visual_tokens,
        layers=spec.decoder.num_layers,
        leading=spec.vision.leading,
        reach=rope_reach(spec),
        tower_layers=spec.vision.feature_layer,
        views=spec.views.total,
        newlines=spec.views.images * spec.views.newlines,
    )

    def plan(method: str, **given: Any) -> PruningPlan:
        _check_model(spec, method)
        return make(method, **given)

    return plan


def _check_model(spec: ModelSpec, method: str) -> None:
    vision, decoder = methods_of(method)
    if vision.reads_cls and not spec.vision.class_token:
        raise InputError(
            f"method {vision.name} reads the vision tower's CLS token, and {spec.vision.kind} has none; use sparsevlm, "
            "divprune, or another that reads none"
        )
    if spec.views.newlines and not vision.skips_padding:
        raise InputError(
            f"method {vision.name} cannot tell an image's padding from its content; add --arrangement views, which leaves "
            "out the model's newlines and unpadding, or use another method"
        )
    if decoder is not None and decoder.raters == "given" and spec.views.counted:
        raise InputError(f"method {decoder.name} ranks the tokens of one image of one size; use another method")


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
    return replace(plan, method=Dense.name, keep=1.0, stages=(), options={})


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
