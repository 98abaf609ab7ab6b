"""Runs targets in processes of their own, which may die."""

from __future__ import annotations

import functools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.fuzz.driver import Finding, Summary, run

_HUNG_SECONDS = 60


def run_all(targets: list[str], share: int, seed: int, seconds: float, jobs: int) -> list[Summary]:
    """Every target in `jobs` parts, of which as many run at a time, each for at most `seconds`."""
    parts = [(name, range(part, share, jobs)) for name in targets for part in range(jobs)]
    return _gather(targets, jobs, [functools.partial(_part, name, numbers, seed, seconds) for name, numbers in parts])


def run_guided(
    targets: list[str], share: int, seed: int, seconds: float, jobs: int, found: Path | None
) -> list[Summary]:
    """Every target under atheris, `jobs` at a time; inputs that fail are written to `found`."""
    return _gather(targets, jobs, [functools.partial(_guided, name, share, seed, seconds, found) for name in targets])


def _gather(targets: list[str], jobs: int, work: list[Callable[[], Summary]]) -> list[Summary]:
    summaries = {name: Summary(name) for name in targets}
    with ThreadPoolExecutor(jobs) as pool:
        for task in as_completed([pool.submit(one) for one in work]):
            done = task.result()
            summaries[done.target].merge(done)
            print(f"{done.target}: {done.executions} executions", file=sys.stderr)  # noqa: T201
    return list(summaries.values())


def _guided(name: str, share: int, seed: int, seconds: float, found: Path | None) -> Summary:
    command = [sys.executable, "-m", "tests.fuzz.guided", name, "--seed", str(seed)]
    command += ["--executions", str(share), "--seconds", str(seconds)]
    command += [] if found is None else ["--found", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        whole = Summary(name)
        whole.add(Finding("Died", f"exit code {done.returncode}", done.stderr[-2000:], -1))
        return whole
    said = json.loads(done.stdout)
    return Summary(
        name,
        **{key: said[key] for key in ("executions", "seconds", "refused", "accepted")},
        findings=[Finding(**one) for one in said["findings"]],
    )


def _part(name: str, numbers: range, seed: int, seconds: float) -> Summary:
    """Run `numbers` in a process of their own; if it dies, that is a finding, and the rest runs in another."""
    whole = Summary(name)
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + seconds
    while numbers and time.monotonic() < deadline:
        at = context.Value("q", -1)
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, numbers, seed, seconds, at, send))
        process.start()
        send.close()
        done = _result(receive, process, at)
        process.join()
        if done is not None:
            whole.merge(done)
            break
        if at.value < 0:
            raise SystemExit(f"target {name} does not start; try --target {name} --only 0")
        whole.add(Finding("Died", f"exit code {process.exitcode}", "the process ended, or was hung", at.value))
        # What it did before is lost with it, but for its number.
        ran = numbers.index(at.value) + 1
        whole.executions += ran
        numbers = numbers[ran:]
    return whole


def _result(receive: Connection, process: BaseProcess, at: Any) -> Summary | None:
    """What the process sends, or None if it died, or had to be ended: no signal's handler interrupts compiled code."""
    number = None
    while not receive.poll(_HUNG_SECONDS):
        if at.value == number:
            process.kill()
            return None
        number = at.value
    try:
        result: Summary = receive.recv()
    except EOFError:
        return None
    return result


def _child(name: str, numbers: range, seed: int, seconds: float, at: Any, send: Connection) -> None:
    def begin(number: int) -> None:
        at.value = number

    send.send(run(name, numbers, seed, seconds, begin))
    send.close()
