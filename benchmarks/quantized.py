"""What quantising the decoder's weights costs micro-llava, dense and pruned: the README's table.

    python benchmarks/quantized.py [--limit N] [--workers 2] [--json FILE]

Prints a Markdown table of exact match on held-out questions; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from accuracy import Job, measure
from rich.progress import track

from vtexport.console import stderr
from vtexport.micro.heldout import NUM_QUESTIONS
from vtexport.targets.onnxruntime.quantize import BITS

SIDES = (("dense", 1.0), ("sparsevlm", 0.44), ("sparsevlm", 0.33), ("fastervlm", 0.25), ("fastervlm", 0.15))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = ("", *BITS)
    todo = [Job(method, keep, quantize=kind) for method, keep in SIDES for kind in kinds]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(measure, todo, [arguments.limit] * len(todo))
        points = dict(zip(todo, track(results, "build and ask", total=len(todo), console=stderr), strict=True))
    print("| | mean tokens | fp32 | " + " | ".join(BITS) + " |")
    print("| --- " * (2 + len(kinds)) + "|")
    for method, keep in SIDES:
        row = [points[Job(method, keep, quantize=kind)] for kind in kinds]
        cells = " | ".join("" if point is None else f"{point.accuracy:.1%}" for point in row)
        tokens = row[0].tokens if row[0] is not None else 0.0
        print(f"| {method}, keep {keep:g} | {tokens:.1f} | {cells} |")
    every = [{**asdict(job), **(asdict(point) if point else {})} for job, point in points.items()]
    result = {"questions": arguments.limit, "points": every}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
