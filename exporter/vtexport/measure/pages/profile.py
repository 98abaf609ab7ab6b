"""The page of `vtexport profile --html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vtexport.measure.pages.page import rendered, share
from vtexport.measure.profile import STAGES, Report, Side

#: what stages are called on the page, and what they comprise
_NAMES = {
    "preprocess": ("Preprocess", "tokens and pixels"),
    "vision": ("Vision", "tower, its pruning, projector"),
    "prefill": ("Prefill", "decoder over the prompt, its pruning"),
    "first_token": ("First token", "preprocess + vision + prefill"),
    "per_token": ("Decode step", "one more token for the whole batch"),
}
#: ticks on the axis of layers at most
_TICKS = 6


@dataclass(frozen=True)
class Step:
    """Decoder layers `first` to `last`, which as many visual `tokens` enter."""

    first: int
    last: int
    tokens: int


def steps(side: Side) -> list[Step]:
    """The schedule of a side as runs of layers with equal numbers of visual tokens."""
    found = []
    for tokens, run in groupby(range(len(side.per_layer)), key=side.per_layer.__getitem__):
        layers = list(run)
        found.append(Step(layers[0], layers[-1], tokens))
    return found


def profile_page(report: Report, layers: int | None = None) -> str:
    """A page of `report`; of each graph's layers, if the report has them, the `layers` slowest."""
    sides = [side for side in (report.this, report.against) if side is not None]
    stages = [stage for stage in STAGES if stage in report.this.stages]
    values = {
        "report": report,
        "sides": list(zip(("this", "other"), sides, labels(sides), strict=False)),
        "stages": [(stage, *_NAMES[stage]) for stage in stages],
        "graphs": list(report.this.on_device),
        "slowest": max(side.stages[stage].p99 for side in sides for stage in stages),
        # A little wider than the greatest gain, so that its mark is not cut.
        "widest_gain": 1.02 * max([1.0, *report.speedup.values(), *report.flops_speedup.values()]),
        "schedule": _schedule(sides),
        "layers": _layers(report, layers),
    }
    return rendered("profile.html.jinja", values)


def labels(sides: Sequence[Side]) -> list[str]:
    """A short name for each side, by which they differ."""
    for names in (
        [side.method if side.method == "dense" else f"{side.method} {side.keep:g}" for side in sides],
        [Path(side.bundle).name for side in sides],
    ):
        if len(set(names)) == len(sides):
            return names
    return [side.bundle if number == 0 else f"{side.bundle} (other)" for number, side in enumerate(sides)]


def _schedule(sides: Sequence[Side]) -> dict[str, Any]:
    """The step chart: a curve per side, in percent of width and height, and the ticks of both axes."""
    number = max(len(side.per_layer) for side in sides)
    most = max(side.visual_tokens for side in sides)
    # Left of layer 0 stand the tokens before any pruning, so that a vision stage is a step as well.
    before = max(1, round(number / 10))
    width = number + before
    every = -(-number // _TICKS)
    return {
        "most": most,
        "begin": share(before, width),
        "curves": [_curve(side, before, width, most) for side in sides],
        "ticks": [(layer, share(before + layer + 0.5, width)) for layer in range(0, number, every)],
        "steps": [steps(side) for side in sides],
    }


def _curve(side: Side, before: int, width: int, most: int) -> dict[str, Any]:
    """One side's line, the area below it, and a label for every step that is wide enough for one."""
    levels = [(0, before, side.visual_tokens)]
    levels += [(before + step.first, before + step.last + 1, step.tokens) for step in steps(side)]
    points = [f"{share(x, width)} {100 - 100 * tokens / most:.3f}" for *ends, tokens in levels for x in ends]
    line = "M" + "L".join(points)
    wide = [level for level in levels[1:] if level[1] - level[0] >= width / 16]
    return {
        "line": line,
        "area": f"{line}V100H0Z",
        "labels": [
            (tokens, share((left + right) / 2, width), f"{100 - 100 * tokens / most:.3f}")
            for left, right, tokens in wide
        ],
    }


def _layers(report: Report, number: int | None) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """Each graph's total over its layers and its slowest ones, in milliseconds."""
    return [(graph, sum(times.values()), list(times.items())[:number]) for graph, times in report.layers.items()]
