"""Which visual tokens stay: one file a method, in PyTorch, the definition every engine is held to.

This module itself imports no PyTorch, so that plans can be read and listed without it.
"""

from vtexport.pruning.base import VisionMethod
from vtexport.pruning.dense import Dense
from vtexport.pruning.fastervlm import FasterVLM
from vtexport.pruning.plan import PruningPlan, Stage
from vtexport.pruning.pool import Pool
from vtexport.pruning.random import Random

METHODS: dict[str, VisionMethod] = {method.name: method for method in (Dense(), FasterVLM(), Random(), Pool())}
DEFAULT_METHOD = FasterVLM.name

__all__ = ["DEFAULT_METHOD", "METHODS", "PruningPlan", "Stage", "VisionMethod", "dense_plan", "make_plan"]


def make_plan(
    method: str,
    *,
    tokens: int,
    layers: int,
    keep: float,
    leading: int = 0,
    options: dict[str, int] | None = None,
) -> PruningPlan:
    """The plan of `method` for an image of `tokens` visual tokens and a decoder of `layers` layers.

    Args:
        method: a key of `METHODS`.
        tokens: visual tokens an image before pruning, leading ones included.
        layers: decoder layers.
        keep: share of the visual tokens kept, in (0, 1].
        leading: tokens before the patches that always stay (CLS under strategy `full`).
        options: the method's own options; those not given have its defaults.

    Raises:
        InputError: unknown method or option, or a keep ratio out of range or too small.
    """
    from vtexport.errors import InputError

    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    given = options or {}
    for name in given:
        if name not in chosen.options:
            raise InputError(f"--{name} has no effect with method {method}; leave it out")
    return chosen.plan(tokens, layers, keep, leading, {**chosen.options, **given})


def dense_plan(plan: PruningPlan) -> PruningPlan:
    """The dense plan of the model that `plan` is for."""
    return make_plan(Dense.name, tokens=plan.num_visual_tokens, layers=plan.num_layers, keep=1.0, leading=plan.leading)
