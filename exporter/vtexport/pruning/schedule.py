"""From a keep ratio to the counts of a decoder-stage schedule: pruning layers, rules, presets, recycling counts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vtexport.errors import InputError
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.geometry import Geometry
from vtexport.pruning.plan import Stage, check_keep, round_half_up

#: how far, in visual tokens, the mean of a schedule may lie from keep * V
TOLERANCE = 1.5
# SparseVLM's pruning layers of 32 (from its released code); other depths scale them.
_LAYERS, _OF = (2, 6, 15), 32
_SUBDIVISIONS = 64


@dataclass(frozen=True)
class Budget:
    """What a decoder-stage method plans its stages for.

    Attributes:
        entering: visual tokens that enter the decoder.
        geometry: of the model.
        keep: mean visual tokens over the decoder's layers, as a share of all visual tokens before any pruning.
        calibration: of the model, or None.
    """

    entering: int
    geometry: Geometry
    keep: float
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @property
    def total(self) -> int:
        """Visual tokens before any pruning."""
        return self.geometry.tokens

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.geometry.layers

    @property
    def target(self) -> float:
        """Mean visual tokens asked for."""
        return self.keep * self.total


@dataclass(frozen=True)
class Preset:
    """A released schedule: `kept` tokens after `layers`, for a number of visual tokens and of decoder layers."""

    method: str
    kept: tuple[int, int, int]
    layers: tuple[int, ...] = _LAYERS
    num_visual_tokens: int = 576
    num_layers: int = _OF


#: the schedules of SparseVLM's released code (v1.5 and "SparseVLM+"), named by its authors' count
PRESETS = {
    "sparsevlm-192": Preset("sparsevlm", (300, 200, 110)),
    "sparsevlm-128": Preset("sparsevlm", (303, 110, 36)),
    "sparsevlm-96": Preset("sparsevlm", (238, 48, 26)),
    "sparsevlm-64": Preset("sparsevlm", (66, 30, 17)),
    "sparsevlm-plus-192": Preset("sparsevlm-plus", (300, 200, 118)),
    "sparsevlm-plus-128": Preset("sparsevlm-plus", (238, 108, 60)),
    "sparsevlm-plus-96": Preset("sparsevlm-plus", (246, 54, 28)),
    "sparsevlm-plus-64": Preset("sparsevlm-plus", (66, 34, 20)),
}


@dataclass(frozen=True)
class Recycling:
    """How many dropped tokens are merged into how many (SparseVLM, section 3.3, with its released code's constants)."""

    pool: float = 0.3
    clusters: float = 0.1

    def counts(self, dropped: int) -> tuple[int, int]:
        """(m, c) for d dropped tokens: m = int(pool * d) + 1 of highest score, c = int(clusters * m) + 1 clusters."""
        if dropped == 0:
            return 0, 0
        pool = min(int(self.pool * dropped) + 1, dropped)
        return pool, min(int(self.clusters * pool) + 1, pool)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """SparseVLM's layers 2, 6, 15 of 32 scaled to `num_layers`, without duplicates and at most `num_layers - 2`."""
    scaled = (layer * num_layers // _OF for layer in _LAYERS)
    return tuple(sorted({min(layer, num_layers - 2) for layer in scaled}))


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """`"2,6,15"` -> (2, 6, 15).

    Raises:
        InputError: not numbers, repeated, or outside 0 … num_layers - 2 (after the last layer nothing is left to save).
    """
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--layers {text!r} is not a list of numbers; write --layers 2,6,15") from error
    for layer in layers:
        if not 0 <= layer <= num_layers - 2:
            raise InputError(
                f"--layers {layer} is out of range: this decoder has {num_layers} layers, and pruning after one pays "
                f"only if another follows; give layers from 0 to {num_layers - 2}"
            )
        if layers.count(layer) > 1:
            raise InputError(f"--layers names layer {layer} twice; give every pruning layer once")
    return tuple(sorted(layers))


def listed(layers: Sequence[int]) -> str:
    """The inverse of `parse_layers`."""
    return ",".join(map(str, layers))


def layers_of(stages: Sequence[Stage]) -> str:
    """The layers after which `stages` prune, as `listed` writes them."""
    return ",".join(str(stage.layer) for stage in stages)


def choose_layers(text: str, budget: Budget) -> tuple[int, ...]:
    """The pruning layers that option `layers` asks for: a list, `auto`, or empty.

    `auto` takes the layers that the calibration found best for this keep ratio. Empty does the same for a calibrated
    model, and takes `default_layers` for others.

    Raises:
        InputError: see `parse_layers`; or `auto` without a calibration.
    """
    if text not in ("", "auto"):
        return parse_layers(text, budget.num_layers)
    if budget.calibration is not None:
        return budget.calibration.pruning_layers(budget.keep)
    if text == "auto":
        raise InputError(
            "--layers auto needs a calibration, which this model's recipe lacks; run vtexport calibrate and give its "
            "file as --calibration"
        )
    return default_layers(budget.num_layers)


def stages_of(
    layers: Sequence[int], entering: int, kept: Sequence[int], recycling: Recycling | None
) -> tuple[Stage, ...]:
    """Stages at `layers` that keep `kept` tokens each and recycle from those they drop."""
    stages: list[Stage] = []
    tokens = entering
    for layer, count in zip(layers, kept, strict=True):
        recycled = recycling.counts(tokens - count)[1] if recycling else 0
        stages.append(Stage.decoder(layer, tokens, count, recycled))
        tokens = stages[-1].carried
    return tuple(stages)


def preset_stages(name: str, method: str, budget: Budget, recycling: Recycling | None) -> tuple[Stage, ...]:
    """The stages of released schedule `name`.

    Raises:
        InputError: unknown, of another method, or for another geometry.
    """
    names = ", ".join(known for known, preset in PRESETS.items() if preset.method == method)
    preset = PRESETS.get(name)
    if preset is None or preset.method != method:
        raise InputError(f"--schedule {name!r} is no schedule of method {method}; choose one of {names}")
    if (preset.num_visual_tokens, preset.num_layers) != (budget.entering, budget.num_layers):
        raise InputError(
            f"--schedule {name} is for {preset.num_visual_tokens} visual tokens and {preset.num_layers} layers, but "
            f"{budget.entering} enter this decoder of {budget.num_layers}; give --keep and let the schedule be solved"
        )
    return stages_of(preset.layers, budget.entering, preset.kept, recycling)


def nominal_ranks(budget: Budget) -> tuple[float, ...]:
    """Ranks for a model without calibration: the shares that the tightest released schedule keeps, by depth."""
    preset = PRESETS["sparsevlm-64"]
    depths = [0.0, *(layer / preset.num_layers for layer in preset.layers), 1.0]
    shares = [count / preset.num_visual_tokens for count in preset.kept]
    shares = [shares[0], *shares, shares[-1]]

    def share(depth: float) -> float:
        after = next(i for i in range(1, len(depths)) if depth <= depths[i])
        low, high = depths[after - 1], depths[after]
        part = (depth - low) / (high - low)
        return shares[after - 1] * (1 - part) + shares[after] * part

    return tuple(share(layer / budget.num_layers) * budget.entering for layer in range(budget.num_layers))


def solve(
    budget: Budget, layers: tuple[int, ...], rule: str, recycling: Recycling | None, method: str
) -> tuple[Stage, ...]:
    """The schedule of `rule` whose mean visual tokens come closest to the budget; the larger of two equally close ones.

    Rule `rank` (the paper's): d_i = round(λ (v - r_i)) of the v tokens that enter pruning layer i leave.
    Rule `proportional`: k_i = round(s r_i) stay. r_i are calibrated ranks (nominal ones without calibration);
    always 1 ≤ k_i ≤ v - 1. All schedules that the rule can yield are compared, so a larger keep never yields a smaller
    mean.

    Raises:
        InputError: no schedule comes within `TOLERANCE` of the budget.
    """
    ranks = nominal_ranks(budget) if budget.calibration is None else budget.calibration.ranks
    family = _family(rule, tuple(ranks[layer] for layer in layers), layers, budget.entering, recycling)
    return nearest(family, budget, method, layers)


def nearest(
    family: Iterable[tuple[Stage, ...]], budget: Budget, method: str, layers: Sequence[int]
) -> tuple[Stage, ...]:
    """The schedule of `family` whose mean visual tokens are nearest to the budget; the larger of two equally near ones.

    Raises:
        InputError: none is within `TOLERANCE`.
    """
    means = {_mean(stages, budget): stages for stages in family}
    best = min(means, key=lambda mean: (abs(mean - budget.target), -mean))
    if best - budget.target > TOLERANCE:
        least = math.ceil(1000 * min(means) / budget.total) / 1000
        raise InputError(
            f"--keep {budget.keep:g} is out of reach of {method} pruning after layers {', '.join(map(str, layers))}: the layers "
            f"up to the first run on {budget.entering} tokens, so {least:g} is the least; prune at earlier --layers, "
            f"or combine with a vision-stage method (--method fastervlm+{method})"
        )
    if budget.target - best > TOLERANCE:
        most = math.floor(1000 * max(means) / budget.total) / 1000
        raise InputError(
            f"--keep {budget.keep:g} is more than {method} can keep here ({most:g}); give a smaller --keep"
        )
    return means[best]


def one_stage(layers: Sequence[int], budget: Budget, method: str) -> tuple[Stage, ...]:
    """The only stage of a method that prunes once, after the one layer given.

    Raises:
        InputError: several layers, or no count within `TOLERANCE`.
    """
    if len(layers) != 1:
        raise InputError(f"--layers {','.join(map(str, layers))}: method {method} prunes once; give one layer")
    family = ((Stage.decoder(layers[0], budget.entering, kept),) for kept in range(1, budget.entering))
    return nearest(family, budget, method, layers)


def _mean(stages: tuple[Stage, ...], budget: Budget) -> float:
    tokens, start, total = budget.entering, 0, 0
    for stage in stages:
        assert stage.layer is not None
        total += tokens * (stage.layer + 1 - start)
        tokens, start = stage.carried, stage.layer + 1
    return (total + tokens * (budget.num_layers - start)) / budget.num_layers


@functools.lru_cache(maxsize=64)
def _family(
    rule: str, ranks: tuple[float, ...], layers: tuple[int, ...], entering: int, recycling: Recycling | None
) -> tuple[tuple[Stage, ...], ...]:
    """Every schedule that `rule` yields."""

    def schedule(parameter: float) -> tuple[Stage, ...]:
        def keep(number: int, tokens: int) -> int:
            if rule == "rank":
                return tokens - round_half_up(parameter * (tokens - ranks[number]))
            return round_half_up(parameter * ranks[number])

        return clamped(layers, entering, keep, recycling)

    # Beyond `largest`, every layer keeps as little (rank) or as much (proportional) as it may.
    if rule == "rank":
        largest = max(entering / max(entering - rank, 1.0) for rank in ranks)
    else:
        largest = entering / max(min(ranks), 1e-3)
    return every_schedule(schedule, largest)


def clamped(
    layers: Sequence[int], entering: int, keep: Callable[[int, int], int], recycling: Recycling | None
) -> tuple[Stage, ...]:
    """Stages that keep `keep(number of the stage, tokens that enter it)`, clamped to 1 … tokens that enter it - 1."""
    stages: list[Stage] = []
    tokens = entering
    for number, layer in enumerate(layers):
        if tokens < 2:
            break
        kept = max(1, min(keep(number, tokens), tokens - 1))
        stages += stages_of([layer], tokens, [kept], recycling)
        tokens = stages[-1].carried
    return tuple(stages)


def every_schedule(schedule: Callable[[float], tuple[Stage, ...]], largest: float) -> tuple[tuple[Stage, ...], ...]:
    """Every schedule that a parameter in [0, largest] yields, by halving the range until neighbours are equal."""
    steps = [largest * i / _SUBDIVISIONS for i in range(_SUBDIVISIONS + 1)]
    schedules = {schedule(step) for step in steps}
    todo = [(low, schedule(low), high, schedule(high)) for low, high in itertools.pairwise(steps)]
    while todo:
        low, first, high, last = todo.pop()
        if first == last or high - low < 1e-7 * largest:
            continue
        middle = (low + high) / 2
        between = schedule(middle)
        schedules.add(between)
        todo += [(low, first, middle, between), (middle, between, high, last)]
    return tuple(sorted(schedules, key=lambda stages: [(s.layer or 0, s.kept) for s in stages]))
