"""Answers do not depend on threads, companions or runs, and a process that answers for long holds no more at its end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import BuildBundle, greedy, noise_images
from vtexport.runtime.request import Result
from vtexport.runtime.runner import Runner

TARGETS = ("onnxruntime", "openvino")
#: methods by name with the keep ratio, each scoring or choosing in a way of its own
PLANS = {
    "sparsevlm": 0.25,
    "dense": 1.0,
    "fastervlm": 0.25,
    "fastervlm+sparsevlm": 0.25,
    "fastv": 0.25,
    "pyramiddrop": 0.6,
    "sparsevlm-plus": 0.25,
    "divprune": 0.25,
    "visionzip": 0.25,
    "vispruner": 0.25,
}
QUESTIONS = (
    "how many?",
    "what digit is red, and where is the 3 beside it?",
    "what?",
    "tell me, in your own words and at some length, what is in it and why",
    "where?",
    "where is the seven, and what colour is it, please?",
    "what digit is red?",
    "is there a blue digit beside the green one?",
)
PAIRS = list(zip(noise_images(len(QUESTIONS)), QUESTIONS, strict=True))
#: of OpenVINO's logits in other shapes of batch: its products are summed in another order then
SLACK = {"onnxruntime": 0.0, "openvino": 1e-4}

on_every_target = pytest.mark.parametrize("target", TARGETS)
#: one runs every time; all of them take several minutes where other programs keep the machine busy
on_the_others_at_length = pytest.mark.parametrize(
    "target", [TARGETS[0], *(pytest.param(target, marks=pytest.mark.long) for target in TARGETS[1:])]
)


def opened(build_bundle: BuildBundle, target: str, method: str = "sparsevlm", **options: Any) -> Runner:
    folder = build_bundle(method=method, keep=PLANS[method], target=target, self_check=False)
    return Runner.open(folder, **options)


def answered(runner: Runner, rows: range) -> list[Result]:
    return greedy(runner, [runner.request(*PAIRS[row]) for row in rows], 6)


def check_same(found: list[Result], wanted: list[Result], slack: float) -> None:
    """The same tokens, kept and generated, and logits within `slack` of the largest."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.kept.keys() == theirs.kept.keys()
        for where, kept in mine.kept.items():
            np.testing.assert_array_equal(kept, theirs.kept[where])
        assert mine.logits is not None
        assert theirs.logits is not None
        assert float(np.abs(mine.logits - theirs.logits).max()) <= slack * float(np.abs(theirs.logits).max())


@on_the_others_at_length
@pytest.mark.parametrize(
    "method", [name if name == "sparsevlm" else pytest.param(name, marks=pytest.mark.long) for name in PLANS]
)
def test_threads_companions_and_runs_do_not_change_an_answer(
    build_bundle: BuildBundle, target: str, method: str
) -> None:
    runner = opened(build_bundle, target, method, threads=1)
    every = range(len(PAIRS))
    alone = [answered(runner, range(row, row + 1))[0] for row in every]
    for first, last in ((0, 2), (2, 5), (0, 8)):
        check_same(answered(runner, range(first, last)), alone[first:last], SLACK[target])
    for threads in (1, 2, 4):
        # The same batch again, in a runner of its own.
        other = opened(build_bundle, target, method, threads=threads)
        check_same(answered(other, range(4)), alone[:4], SLACK[target])


@on_the_others_at_length
def test_another_process_gives_the_same_bits(build_bundle: BuildBundle, target: str) -> None:
    code = (
        "import sys, json; from tests.test_long_life import *; runner = Runner.open(sys.argv[1], threads=1);"
        "print(json.dumps([result.logits.tobytes().hex() for result in answered(runner, range(3))]))"
    )
    runner = opened(build_bundle, target, threads=1)
    command = [sys.executable, "-c", code, str(runner.bundle.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    mine = [result.logits.tobytes().hex() for result in answered(runner, range(3)) if result.logits is not None]
    assert json.loads(done.stdout.splitlines()[-1]) == mine


@on_the_others_at_length
def test_threads_may_share_a_runner(build_bundle: BuildBundle, target: str) -> None:
    """Each asks all questions, in another order, with a vision cache that all of them fill and empty."""
    runner = opened(build_bundle, target, vision_cache=300_000)
    alone = [runner.ask([pair], 4)[0].token_ids for pair in PAIRS]

    def ask(first: int) -> list[list[int]]:
        found = {}
        for turn in range(2 * len(PAIRS)):
            row = (first + turn) % len(PAIRS)
            found[row] = runner.ask([PAIRS[row]], 4)[0].token_ids
        return [found[row] for row in range(len(PAIRS))]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [alone] * 4
    kept = runner._vision
    assert kept._bytes == sum(array.nbytes for row in kept._rows.values() for array in row.values()) <= 300_000


def held() -> tuple[int, int, float]:
    """Open files, threads, and MiB of resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    files = os.listdir("/proc/self/fd")
    return len(files), int(fields["Threads"]), int(fields["VmRSS"].split()[0]) / 1024


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_proc
@on_the_others_at_length
def test_generations_leave_nothing_behind(build_bundle: BuildBundle, target: str) -> None:
    runner = opened(build_bundle, target, threads=1, vision_cache=300_000)

    def live(number: int) -> None:
        for turn in range(number):
            runner.ask(PAIRS[turn % 5 : turn % 5 + 1 + turn % 3], 3)

    live(40)
    gc.collect()
    before = held()
    live(60)
    gc.collect()
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    # A leak of a batch's cache or of its images would be ten times as much.
    assert after[2] - before[2] < 8


@needs_proc
@on_every_target
@pytest.mark.long
def test_runners_that_are_dropped_leave_nothing_behind(build_bundle: BuildBundle, target: str) -> None:
    opened(build_bundle, target)

    def live(number: int) -> None:
        for _ in range(number):
            opened(build_bundle, target, threads=1).ask(PAIRS[:1], 1)
            gc.collect()

    live(5)
    before = held()
    live(15)
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    # The weights are 12 MB, so that a runner kept alive now and then would show.
    assert after[2] - before[2] < 60
