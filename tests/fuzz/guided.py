"""One target under atheris, which is libFuzzer for Python: an input that reaches new code leads to others.

`python -m tests.fuzz --guided` starts one process per target with this module, because libFuzzer ends the process it
runs in. It needs `pip install atheris`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import sys
import time
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import NoReturn

import atheris

from tests.fuzz import driver
from tests.fuzz.mutations import mutate

#: packages that parse in Python, whose code is watched; compiled code runs unwatched
WATCHED = ("vtexport", "PIL", "jinja2")
KEPT = Path(__file__).parent / "kept"
#: for one input that no signal's handler interrupts
HUNG_SECONDS = 60


def _mutator(data: bytes, largest: int, seed: int) -> bytes:
    """Mostly damage as in an unguided run, which knows JSON; else libFuzzer's own, which knows what was compared."""
    rng = random.Random(seed)
    if data and rng.random() < 0.75:
        return mutate([data], rng)[:largest]
    changed: bytes = atheris.Mutate(data, largest)
    return changed


def _corpus(name: str, seeds: list[bytes], folder: Path) -> None:
    folder.mkdir()
    kept = [path.read_bytes() for path in sorted(KEPT.glob(f"{name}/*"))]
    for number, data in enumerate(seeds + kept):
        (folder / f"{number:04}").write_bytes(data)


def _watch() -> None:
    """Count the branches of what is loaded. atheris would do it on import, but not where an editable install's loader is."""
    for found in gc.get_objects():
        # Not isinstance: some objects of torch warn when they are asked for their class.
        if type(found) is FunctionType and str(found.__module__).partition(".")[0] in WATCHED:
            atheris.instrument_func(found)


def main() -> NoReturn:
    """Execute as many inputs as asked for, print a summary as JSON and end the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--executions", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, help="folder for inputs that fail")
    given = parser.parse_args()
    summary = driver.Summary(given.target)
    # An attempt has standard error to itself.
    stderr = os.dup(2)

    def watch_the_clock() -> None:
        faulthandler.dump_traceback_later(HUNG_SECONDS, file=stderr, exit=True)

    with contextlib.ExitStack() as stack:
        target, seeds, place = stack.enter_context(driver.prepared(given.target))
        corpus = place.parent / "corpus"
        _corpus(given.target, seeds, corpus)
        watch_the_clock()
        # Whatever is loaded on first use shall be watched too; what fails here fails again below.
        for data in seeds:
            with contextlib.suppress(Exception):
                target.one(data, place)
        _watch()
        driver.limit_memory()
        started = time.monotonic()

        def execute(data: bytes) -> None:
            watch_the_clock()
            passed = driver.tally(summary, target, data, place, summary.executions + 1)
            if not passed and given.found is not None:
                (given.found / f"{given.target}-{sha256(data).hexdigest()[:12]}.bin").write_bytes(data)
            summary.seconds = time.monotonic() - started
            if summary.executions == given.executions or summary.seconds > given.seconds:
                stack.close()
                print(json.dumps(summary.report()), flush=True)  # noqa: T201
                os._exit(0)

        # Our own limits hold, and libFuzzer's clock would take the signal that they use. Our damage comes in several pieces
        # already; five times as many leave little of a file.
        options = ["-timeout=0", "-rss_limit_mb=0", "-mutate_depth=1", f"-seed={given.seed + 1}"]
        if given.found is not None:
            given.found.mkdir(exist_ok=True)
            options.append(f"-artifact_prefix={given.found}/{given.target}-")
        atheris.Setup([sys.argv[0], *options, str(corpus)], execute, custom_mutator=_mutator)
        atheris.Fuzz()
    raise SystemExit("atheris ended before its executions did")


if __name__ == "__main__":
    main()
