"""`python -m tests.fuzz`: many damaged files, in processes of their own; the result as JSON.

An input is known by the run's seed and its number: `--target NAME --seed S --only N` runs it alone, with a traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.driver import attempt, input_of, prepared
from tests.fuzz.processes import run_all
from tests.fuzz.targets import names

FOUND = Path(__file__).parent / "found"
FOREVER = 1e9


def main() -> int:
    """Run what the command line asks for; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=names(), help="may be given several times; all by default")
    parser.add_argument("--executions", type=int, default=10_000, help="in all, shared equally among the targets")
    parser.add_argument("--seconds", type=float, default=FOREVER, help="at most, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="N", help="run input N of one target alone")
    parser.add_argument("--write", action="store_true", help=f"write inputs that fail to {FOUND.name}/TARGET-N.bin")
    given = parser.parse_args()
    targets = given.target or names()
    if given.only is not None:
        return _only(targets[0], given.seed, given.only, given.write)
    started = time.monotonic()
    share = -(-given.executions // len(targets))
    seconds = given.seconds / len(targets)
    summaries = run_all(targets, share, given.seed, seconds, given.jobs)
    for summary in summaries if given.write else []:
        for one in summary.findings:
            _write(summary.target, given.seed, one.number)
    total = sum(summary.executions for summary in summaries)
    report = {"seed": given.seed, "executions": total, "wall_seconds": round(time.monotonic() - started, 1)}
    print(json.dumps({**report, "targets": [one.report() for one in summaries]}))  # noqa: T201
    return int(any(summary.findings for summary in summaries))


def _only(name: str, seed: int, number: int, write: bool) -> int:
    with prepared(name) as (target, seeds, place):
        data = input_of(seeds, seed, number)
        print(f"{len(data)} bytes: {data[:2000]!r}", file=sys.stderr)  # noqa: T201
        if write:
            _write(name, seed, number)
        try:
            accepted = attempt(target, data, place)
        except BaseException:  # noqa: BLE001 - shown, whatever it is
            traceback.print_exc()
            return 1
    print("accepted" if accepted else "refused", file=sys.stderr)  # noqa: T201
    return 0


def _write(name: str, seed: int, number: int) -> None:
    FOUND.mkdir(exist_ok=True)
    with prepared(name) as (_, seeds, _place):
        (FOUND / f"{name}-{number}.bin").write_bytes(input_of(seeds, seed, number))


if __name__ == "__main__":
    raise SystemExit(main())
