"""Sides of a comparison in processes of their own, which take turns on a machine that does nothing else.

A side answers each line on its stdin, the JSON of a `Task`, with a line of JSON: `first_token`, `per_token` and `total` in
milliseconds (medians are over tasks, so each is of one task), maybe `vision` and `prefill`, the greedy `tokens` of the
first row, and `peak_mib`. Sides get the same number of threads and the same processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

Answer = dict[str, Any]
#: the script that is a side
SIDE = str(Path(__file__).with_name("side.py"))
#: a share of processor time above this, before a measurement, is other programs' work
BUSY = 0.1
#: seconds over which that share is taken, and seconds to wait for it to fall
WATCH = 5
PATIENCE = 600


@dataclass(frozen=True)
class Task:
    """What a side is to answer.

    Attributes:
        seed: of the images, so that no task has an image of another.
        new_tokens: tokens per row; no row ends earlier.
        rows: prompts.
        text: text tokens of a prompt at least; 0 for the question alone.
    """

    seed: int
    new_tokens: int
    rows: int = 1
    text: int = 0

    def images(self, edge: int) -> list[Any]:
        """A random image per row."""
        random = np.random.default_rng(self.seed)
        return [Image.fromarray(random.integers(0, 256, (edge, edge, 3), dtype=np.uint8)) for _ in range(self.rows)]


def serve(answer: Callable[[Task], Answer]) -> None:
    """Be a side: answer the tasks on stdin until it ends."""
    print("{}", flush=True)
    for line in sys.stdin:
        found = answer(Task(**json.loads(line)))
        print(json.dumps({**found, "peak_mib": peak_mib()}), flush=True)


def peak_mib(pid: int | None = None) -> float:
    """A process's peak of resident memory, or this one's; getrusage tells its parent's, if that was higher at the start."""
    status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


class Side:
    """A side's process: a script that calls `serve`."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._answer()

    def run(self, task: Task) -> Answer:
        assert self._process.stdin is not None
        print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        # Some libraries print to stdout as well.
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: Answer = json.loads(line)
                return answer
        raise SystemExit(f"a side stopped with exit code {self._process.wait()}; its message stands above")

    def close(self) -> None:
        self._process.communicate()


def in_turns(
    sides: Mapping[str, Sequence[str]], tasks: Sequence[Task], threads: int, *, warm_up: int = 1, busy: bool = False
) -> dict[str, list[Answer]]:
    """The answers of every side to all tasks but the first `warm_up`; sides take turns, each first as often as last.

    Args:
        sides: the command of each, by its name.
        tasks: the tasks.
        threads: threads of each side.
        warm_up: tasks that are not counted.
        busy: measure although other programs run.
    """
    with ExitStack() as stack:
        running = {}
        for name, command in sides.items():
            running[name] = Side(command, threads)
            stack.callback(running[name].close)
        if not busy:
            wait_until_quiet()
        answers: dict[str, list[Answer]] = {name: [] for name in running}
        for number, task in enumerate(tasks):
            for name in list(running)[:: 1 if number % 2 == 0 else -1]:
                answer = running[name].run(task)
                if number >= warm_up:
                    answers[name].append(answer)
        return answers


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Medians of all times, the smallest and the largest time to the first token, and the peak of memory."""
    times = [name for name in answers[0] if name not in ("tokens", "peak_mib")]
    first = [answer["first_token"] for answer in answers]
    return {
        **{name: median(answer[name] for answer in answers) for name in times},
        "fastest_first_token": min(first),
        "slowest_first_token": max(first),
        "peak_mib": answers[-1]["peak_mib"],
    }


def report(result: Mapping[str, Any], path: Path | None) -> None:
    """Print what was measured as one line of JSON, and write it to `path` if there is one."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def wait_until_quiet() -> None:
    """Return when no other program keeps the processors busy, or stop."""
    start = time.monotonic()
    while (busy := _busy_share()) > BUSY:
        if time.monotonic() - start > PATIENCE:
            raise SystemExit(f"other programs keep this machine {busy:.0%} busy; stop them and run again")


def _busy_share() -> float:
    """The share of all processors' time that was used in the last seconds."""
    before = _processor_times()
    time.sleep(WATCH)
    passed = [now - then for now, then in zip(_processor_times(), before, strict=True)]
    idle = passed[3] + passed[4]
    return 1 - idle / sum(passed)


def _processor_times() -> list[int]:
    """Ticks by kind, of all processors: proc_stat(5)."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
