"""Accuracy of every method and keep ratio on micro-llava's held-out questions: the README's table and plot.

    python benchmarks/accuracy.py [--limit N] [--json FILE] [--plot FILE.png]

Prints a Markdown table; random is the mean of three seeds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from rich.progress import track

from vtexport.build import BuildOptions, build
from vtexport.console import stderr
from vtexport.evaluate import evaluate
from vtexport.micro.heldout import NUM_QUESTIONS
from vtexport.runtime import Runner

KEEPS = (0.5, 0.25, 0.15, 0.1, 0.05)
SEEDS = (0, 1, 2)


def measure(work: Path, method: str, keep: float, limit: int, seed: int | None = None) -> tuple[float, float]:
    """(accuracy, mean visual tokens) of one plan."""
    given = {} if seed is None else {"seed": seed}
    out = work / f"{method}-{keep}-{seed}"
    runner = Runner(build(BuildOptions("micro-llava", keep, method, method_options=given), out))
    return evaluate(runner, limit).accuracy, runner.plan.mean_visual_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    jobs: list[tuple[str, float, int | None]] = [("dense", 1.0, None)]
    for keep in KEEPS:
        jobs += [("fastervlm", keep, None), ("pool", keep, None), *(("random", keep, s) for s in SEEDS)]
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for method, keep, seed in track(jobs, "build and ask", console=stderr):
            point = measure(Path(scratch), method, keep, arguments.limit, seed)
            found.setdefault((method, keep), []).append(point)
    rows = [
        {"method": method, "keep": keep, "tokens": mean(t for _, t in points), "accuracy": mean(a for a, _ in points)}
        for (method, keep), points in found.items()
    ]
    print(table(rows))
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    result = {"questions": arguments.limit, "rows": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a row a keep ratio, a column a method."""
    cells = {(row["method"], row["keep"]): row for row in rows}

    def cell(method: str, keep: float) -> str:
        row = cells[method, keep]
        return f"{row['accuracy']:.1%} ({row['tokens']:g})"

    lines = ["| keep | fastervlm | pool | random |", "| --- | --- | --- | --- |"]
    dense = cell("dense", 1.0)
    lines.append(f"| 1 (dense) | {dense} | {dense} | {dense} |")
    for keep in KEEPS:
        lines.append(f"| {keep:g} | " + " | ".join(cell(m, keep) for m in ("fastervlm", "pool", "random")) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Accuracy over visual tokens, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    dense = next(row for row in rows if row["method"] == "dense")
    for method in ("fastervlm", "pool", "random"):
        line = [dense, *(row for row in rows if row["method"] == method)]
        axes.plot([r["tokens"] for r in line], [100 * float(str(r["accuracy"])) for r in line], "o-", label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({float(str(row["tokens"])) for row in rows if row["method"] in ("dense", "fastervlm")})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("visual tokens that enter the decoder, of 144")
    axes.set_ylabel("exact match, %")
    axes.set_title("micro-llava, held-out questions")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
