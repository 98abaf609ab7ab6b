"""Runs targets in processes of their own, which may die."""

from __future__ import annotations

import multiprocessing
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.fuzz.driver import Finding, Summary, run

_HUNG_SECONDS = 60


def run_all(targets: list[str], share: int, seed: int, seconds: float, jobs: int) -> list[Summary]:
    """Every target in `jobs` parts, of which as many run at a time, each for at most `seconds`."""
    summaries = {name: Summary(name) for name in targets}
    todo: queue.SimpleQueue[tuple[str, range]] = queue.SimpleQueue()
    for name in targets:
        for part in range(jobs):
            todo.put((name, range(part, share, jobs)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                name, numbers = todo.get_nowait()
            except queue.Empty:
                return
            done = _part(name, numbers, seed, seconds)
            with lock:
                summaries[name].merge(done)
                print(f"{name}: {done.executions} executions", file=sys.stderr)  # noqa: T201

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(summaries.values())


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
