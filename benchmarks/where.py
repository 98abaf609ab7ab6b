"""Where pruning pays on the CPU: batch, text length and visual tokens, dense against pruned.

    python benchmarks/where.py [--target openvino] [--dtype bf16] [--runs 2] [--new-tokens 64] [--keep 0.25]
                               [--threads 2] [--json FILE]

The 0.45 B model of `cpu.py`, with 576 visual tokens, and as a LLaVA-1.6 with 2,880. Sides as in `apart.py`; each cell is
the time to the first token and that of whole answers, for all prompts of the batch. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from apart import SIDE, Task, in_turns, report, summary
from models import half_billion_llava

from vtexport import BuildOptions, build
from vtexport.measure.machine import device_name
from vtexport.models.spec import ViewChoice

#: text tokens and prompts per batch, by tiles in a row of the image
CELLS = {
    0: ((0, 1), (512, 1), (0, 4), (512, 4), (0, 8), (512, 8)),
    2: ((0, 1), (512, 1), (0, 4), (512, 4), (0, 8)),
}
VISUAL = {0: 576, 2: 2880}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--method", default="sparsevlm")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="measure although other programs run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    points: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        for tiles, cells in CELLS.items():
            work = Path(scratch) / str(tiles)
            model = half_billion_llava(work / "model", tiles)
            sides = {}
            for method, keep in (("dense", 1.0), (arguments.method, arguments.keep)):
                print(f"build {method}, {VISUAL[tiles]} visual tokens", flush=True)
                wanted = BuildOptions(
                    str(model),
                    keep,
                    method,
                    arguments.target,
                    arguments.dtype,
                    self_check=False,
                    views=ViewChoice(grid=f"{tiles}x{tiles}" if tiles else None),
                )
                folder = build(wanted, work / method).folder
                sides[method] = [SIDE, "vtexport", str(folder), str(arguments.threads)]
            for text, rows in cells:
                tasks = [Task(seed, arguments.new_tokens, rows, text) for seed in range(arguments.runs)]
                # What a side prepares when it first runs is not counted.
                tasks.insert(0, Task(arguments.runs, 2))
                answers = in_turns(sides, tasks, arguments.threads, busy=arguments.busy)
                point = {"visual": VISUAL[tiles], "text": text, "rows": rows}
                found = {method: summary(answered) for method, answered in answers.items()}
                points.append({**point, **found})
                for method, figures in found.items():
                    print(
                        point,
                        method,
                        *(round(figures[name]) for name in ("first_token", "total", "peak_mib")),
                        flush=True,
                    )
    result = {
        "device": device_name(),
        "target": arguments.target,
        "dtype": arguments.dtype,
        "method": arguments.method,
        "keep": arguments.keep,
        "runs": arguments.runs,
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "points": points,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
