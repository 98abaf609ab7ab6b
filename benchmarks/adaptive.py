"""`--keep auto` against fixed keep ratios at equal mean tokens, on micro-llava's held-out questions.

    python benchmarks/adaptive.py [--method sparsevlm] [--limit N] [--workers 2] [--plot FILE.png]

For every target accuracy one adaptive bundle is asked, then a fixed one whose keep ratio is the mean share of tokens
that the adaptive one used. Prints a Markdown table; the last line is one JSON object.
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
from typing import Literal

from vtexport.micro.heldout import NUM_QUESTIONS

TARGETS = (0.9, 0.93, 0.95, 0.97, 0.98)
BUCKETS = (0.5, 0.33, 0.25, 0.17, 0.125)


@dataclass(frozen=True)
class Point:
    """Accuracy, mean visual tokens, and the share of questions that each keep ratio answered."""

    accuracy: float
    tokens: float
    shares: dict[float, float]


def measure(method: str, keep: float | Literal["auto"], target: float | None, limit: int) -> Point:
    """Build and ask one bundle, with one thread."""
    import torch

    from vtexport import BuildOptions, Runner, build
    from vtexport.measure.evaluate import evaluate

    torch.set_num_threads(1)
    buckets = BUCKETS if target is not None else None
    options = BuildOptions("micro-llava", keep, method, buckets=buckets, target_accuracy=target, self_check=False)
    with tempfile.TemporaryDirectory() as scratch:
        score = evaluate(Runner(build(options, Path(scratch) / "bundle"), threads=1), limit)
    shares = {ratio: count / score.total for ratio, count in score.by_keep.items()}
    return Point(score.accuracy, score.mean_visual_tokens, shares)


@dataclass(frozen=True)
class Row:
    """One target accuracy: the adaptive bundle, and the fixed one with the same mean tokens."""

    target: float
    adaptive: Point
    fixed: Point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsevlm")
    parser.add_argument("--limit", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    total = 144
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:

        def ask(keeps: Sequence[float | Literal["auto"]], targets: Sequence[float | None]) -> list[Point]:
            both = [arguments.method] * len(keeps), keeps, targets, [arguments.limit] * len(keeps)
            return list(pool.map(measure, *both))

        adaptive = ask(["auto"] * len(TARGETS), TARGETS)
        fixed = ask([round(point.tokens / total, 4) for point in adaptive], [None] * len(adaptive))
    rows = [Row(*row) for row in zip(TARGETS, adaptive, fixed, strict=True)]
    print(table(rows))
    if arguments.plot is not None:
        plot(rows, arguments.method, arguments.plot)
    print(json.dumps({"method": arguments.method, "questions": arguments.limit, "rows": [asdict(row) for row in rows]}))


def table(rows: list[Row]) -> str:
    """A Markdown table with a row per target accuracy."""
    lines = ["| target | `--keep auto` | mean tokens | one keep ratio | mean tokens | questions at each ratio |"]
    lines.append("| --- " * 6 + "|")
    for row in rows:
        shares = ", ".join(f"{keep:g}: {share:.0%}" for keep, share in row.adaptive.shares.items() if share)
        lines.append(
            f"| {row.target:g} | {row.adaptive.accuracy:.1%} | {row.adaptive.tokens:.1f} | {row.fixed.accuracy:.1%} | "
            f"{row.fixed.tokens:.1f} | {shares} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], method: str, path: Path) -> None:
    """Plot accuracy over mean visual tokens, adaptive and fixed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, points in (("--keep auto", [r.adaptive for r in rows]), ("one keep ratio", [r.fixed for r in rows])):
        ordered = sorted(points, key=lambda point: point.tokens)
        axes.plot([p.tokens for p in ordered], [100 * p.accuracy for p in ordered], "o-", label=label)
    axes.set_xlabel("mean visual tokens of 144, over layers and questions")
    axes.set_ylabel("exact match, %")
    axes.set_title(f"micro-llava, {method}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
