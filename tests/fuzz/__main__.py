"""`python -m tests.fuzz`: many damaged files, in processes of their own; the result as JSON.

An input is known by the run's seed and its number: `--target NAME --seed S --only N` runs it alone, with a traceback.
With `--guided`, inputs lead to others by the code that they reach, so there `--write` keeps those that fail and
`--target NAME --input FILE` runs one of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.driver import attempt, input_of, prepared
from tests.fuzz.processes import run_all, run_guided
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
    parser.add_argument("--input", type=Path, metavar="FILE", help="run FILE as an input of one target alone")
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    parser.add_argument("--write", action="store_true", help=f"write inputs that fail to {FOUND.name}/TARGET-*.bin")
    given = parser.parse_args()
    targets = given.target or names()
    alone = given.only is not None or given.input is not None
    if alone and len(targets) != 1:
        parser.error("--only and --input run an input of one target; give one --target")
    if given.guided and (alone or importlib.util.find_spec("atheris") is None):
        parser.error("--guided runs many inputs and needs atheris; pip install atheris, without --only and --input")
    if alone:
        return _alone(targets[0], given)
    started = time.monotonic()
    share = -(-given.executions // len(targets))
    seconds = given.seconds / len(targets)
    if given.guided:
        summaries = run_guided(targets, share, given.seed, seconds, given.jobs, FOUND if given.write else None)
    else:
        summaries = run_all(targets, share, given.seed, seconds, given.jobs)
        for summary in summaries if given.write else []:
            for one in summary.findings:
                _write(summary.target, given.seed, one.number)
    total = sum(summary.executions for summary in summaries)
    report = {
        "seed": given.seed,
        "guided": given.guided,
        "executions": total,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps({**report, "targets": [one.report() for one in summaries]}))  # noqa: T201
    return int(any(summary.findings for summary in summaries))


def _alone(name: str, given: argparse.Namespace) -> int:
    with prepared(name) as (target, seeds, place):
        data = given.input.read_bytes() if given.input is not None else input_of(seeds, given.seed, given.only)
        print(f"{len(data)} bytes: {data[:2000]!r}", file=sys.stderr)  # noqa: T201
        if given.write and given.only is not None:
            _write(name, given.seed, given.only)
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
