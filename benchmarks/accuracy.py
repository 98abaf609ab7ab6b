"""Accuracy of every method and keep ratio on micro-llava's held-out questions: the README's table and plot.

    python benchmarks/accuracy.py [--limit N] [--workers 2] [--methods a,b] [--json FILE] [--plot FILE.png]

Prints a Markdown table, then the two schedule rules of sparsevlm at equal mean tokens; random is the mean of three
seeds. FLOPs are the decoder's prefill for the questions' own length. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import track

from vtexport.cli.console import stderr
from vtexport.micro.heldout import NUM_QUESTIONS

KEEPS = (0.5, 0.33, 0.25, 0.17, 0.11)
SEEDS = (0, 1, 2)
METHODS = (
    "sparsevlm",
    "sparsevlm-plus",
    "fastv",
    "pyramiddrop",
    "exit",
    "fastervlm+sparsevlm",
    "fastervlm",
    "vtc-cls",
    "vispruner",
    "visionzip",
    "divprune",
    "pool",
    "random",
)
# The rules differ only where several layers prune: SparseVLM's scaled to twelve layers, and one later.
RULE_LAYERS = ("0,2,5", "1,2,6")
TEXT_TOKENS = 13


@dataclass(frozen=True)
class Job:
    """One bundle to build and ask."""

    method: str
    keep: float
    options: tuple[tuple[str, str | int], ...] = ()
    quantize: str = ""
    model: str = "micro-llava"
    target: str = "onnxruntime"


@dataclass(frozen=True)
class Point:
    """The result of a job: accuracy (also by kind), mean visual tokens, share of the dense decoder's FLOPs."""

    accuracy: float
    tokens: float
    flops: float
    by_kind: dict[str, float]


def measure(job: Job, limit: int) -> Point | None:
    """Build and ask one bundle, with one thread; None if the keep ratio is out of the method's reach."""
    import torch

    from vtexport import BuildOptions, InputError, Runner, build
    from vtexport.measure.evaluate import evaluate
    from vtexport.models import read_spec
    from vtexport.models.resolve import recipe_calibration
    from vtexport.pruning import dense_plan, parts_of
    from vtexport.pruning.flops import plan_flops

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        target = {"quantize": job.quantize} if job.quantize else {}
        calibration = recipe_calibration("micro-llava") if job.model != "micro-llava" else None
        options = BuildOptions(
            job.model,
            job.keep,
            job.method,
            job.target,
            "fp32",
            method_options=dict(job.options),
            target_options=target,
            calibration=calibration if parts_of(job.method)[1] is not None else None,
            self_check=False,
        )
        try:
            bundle = build(options, Path(scratch) / "bundle")
        except InputError:
            return None
        runner = Runner(bundle, threads=1)
        score = evaluate(runner, limit)
        spec, plan = read_spec(bundle.processor_folder), runner.plan
    share = plan_flops(spec, plan, TEXT_TOKENS).prefill / plan_flops(spec, dense_plan(plan), TEXT_TOKENS).prefill
    kinds = {kind: right / total for kind, (right, total) in score.by_kind.items()}
    return Point(score.accuracy, plan.mean_visual_tokens, share, kinds)


def jobs(methods: Sequence[str]) -> list[Job]:
    todo = [Job("dense", 1.0)]
    for method in methods:
        seeds = [(("seed", seed),) for seed in SEEDS] if method == "random" else [()]
        todo += [Job(method, keep, options) for keep in KEEPS for options in seeds]
    if "sparsevlm" in methods:
        for layers in RULE_LAYERS:
            for rule in ("rank", "proportional"):
                todo += [Job("sparsevlm", keep, (("layers", layers), ("rule", rule))) for keep in KEEPS]
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    todo = jobs(methods)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(measure, todo, [arguments.limit] * len(todo))
        points = dict(zip(todo, track(results, "build and ask", total=len(todo), console=stderr), strict=True))
    rows = summary(points, methods)
    print(table(rows, methods))
    print()
    print(rules(points))
    if arguments.plot is not None:
        plot(rows, methods, arguments.plot)
    every = [{**asdict(job), **(asdict(point) if point else {})} for job, point in points.items()]
    result = {"questions": arguments.limit, "points": every}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def summary(points: dict[Job, Point | None], methods: Sequence[str]) -> dict[tuple[str, float], Point | None]:
    """Points by method and keep ratio: seeds averaged, rule comparisons left out."""
    rows: dict[tuple[str, float], Point | None] = {}
    for method, keep in [("dense", 1.0), *((m, k) for m in methods for k in KEEPS)]:
        same = [p for j, p in points.items() if (j.method, j.keep) == (method, keep) and _plain(j) and p is not None]
        rows[method, keep] = _mean(same) if same else None
    return rows


def _plain(job: Job) -> bool:
    return all(name == "seed" for name, _ in job.options)


def _mean(points: list[Point]) -> Point:
    kinds = {kind: mean(p.by_kind[kind] for p in points) for kind in points[0].by_kind}
    return Point(mean(p.accuracy for p in points), points[0].tokens, points[0].flops, kinds)


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{point.accuracy:.1%} ({point.tokens:.3g})"


def table(rows: dict[tuple[str, float], Point | None], methods: Sequence[str]) -> str:
    """A Markdown table with a row per method and a column per keep ratio."""
    lines = ["| method | " + " | ".join(f"{keep:g}" for keep in KEEPS) + " |", "| --- " * (len(KEEPS) + 1) + "|"]
    lines.append("| `dense` | " + " | ".join([_cell(rows["dense", 1.0])] * len(KEEPS)) + " |")
    for method in methods:
        lines.append(f"| `{method}` | " + " | ".join(_cell(rows[method, keep]) for keep in KEEPS) + " |")
    return "\n".join(lines)


def rules(points: dict[Job, Point | None]) -> str:
    """A Markdown table of the two rules for each set of layers."""
    lines = ["| layers, rule | " + " | ".join(f"{keep:g}" for keep in KEEPS) + " |", "| --- " * (len(KEEPS) + 1) + "|"]
    for layers in RULE_LAYERS:
        for rule in ("rank", "proportional"):
            options = (("layers", layers), ("rule", rule))
            cells = [_cell(points.get(Job("sparsevlm", keep, options))) for keep in KEEPS]
            lines.append(f"| {layers}, {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[tuple[str, float], Point | None], methods: Sequence[str], path: Path) -> None:
    """Plot accuracy over the decoder's prefill FLOPs, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    dense: Any = rows["dense", 1.0]
    inside = ("sparsevlm", "sparsevlm-plus", "fastv", "pyramiddrop", "exit", "fastervlm+sparsevlm")
    for number, method in enumerate(methods):
        line = [dense, *(point for keep in KEEPS if (point := rows[method, keep]) is not None)]
        style = "o-" if method in inside else "s--"
        colour = pyplot.colormaps["tab20"](number)
        axes.plot([100 * p.flops for p in line], [100 * p.accuracy for p in line], style, label=method, color=colour)
    axes.set_xlabel("decoder prefill FLOPs, % of dense")
    axes.set_ylabel("exact match, %")
    axes.set_title("micro-llava, held-out questions (solid: pruned inside the decoder)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
