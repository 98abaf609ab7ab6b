"""A sample of what `python -m tests.fuzz` runs, and every input that once failed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import driver
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, load, names
from vtexport.errors import InputError

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "kept"
#: for one input; generous, because tests share their cores
SECONDS = 30
Prepared = tuple[Target, list[bytes], Path]


@pytest.fixture(scope="module", params=names())
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    with driver.prepared(request.param) as found:
        yield found


def test_valid_files_are_used(prepared: Prepared) -> None:
    """Some seeds are of a kind that is refused, so that what lies near it is tried too."""
    target, seeds, place = prepared
    accepted = [driver.attempt(target, data, place, SECONDS) for data in seeds]
    assert any(accepted)
    assert list(place.iterdir()) == []


@settings(max_examples=60, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_damaged_files_are_refused_in_one_line_or_used(prepared: Prepared, rng: random.Random) -> None:
    target, seeds, place = prepared
    driver.attempt(target, mutate(seeds, rng), place, SECONDS)


@pytest.mark.parametrize("path", sorted(KEPT.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_failed_does_not(path: Path) -> None:
    with driver.prepared(path.parent.name) as (target, _, place):
        driver.attempt(target, path.read_bytes(), place, SECONDS)


# The driver itself


class Stub:
    """A target that does what the first byte says."""

    @staticmethod
    def seeds(_place: Path) -> list[bytes]:
        return [b"good"]

    @staticmethod
    def one(data: bytes, _place: Path) -> None:
        if data[:1] == b"r":
            raise InputError("refused; give another")
        if data[:1] == b"b":
            raise KeyError("broken")
        if data[:1] == b"s":
            time.sleep(60)
        if data[:1] == b"h":
            assert 3 ** (1 << 28)
        if data[:1] == b"m":
            assert b"x" * (driver.GROWTH_BYTES + (32 << 20))
        if data[:1] == b"p":
            print("said")  # noqa: T201
        if data[:1] in (b"1", b"2"):
            os.write(int(data[:1]), b"said")


def test_bugs_come_out_of_an_attempt(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="broken"):
        driver.attempt(Stub, b"b", tmp_path, SECONDS)
    for printing in (b"p", b"1", b"2"):
        with pytest.raises(driver.Printed, match="said"):
            driver.attempt(Stub, printing, tmp_path, SECONDS)
    assert driver.attempt(Stub, b"good", tmp_path)
    assert not driver.attempt(Stub, b"refused", tmp_path)


def test_memory_counts_in_a_process_that_was_once_larger(tmp_path: Path) -> None:
    assert b"x" * 2 * driver.GROWTH_BYTES
    with pytest.raises(driver.TooLarge, match=r"MiB for 1 bytes"):
        driver.attempt(Stub, b"m", tmp_path, SECONDS)


def test_attempts_end_after_their_time() -> None:
    """In a process of its own: under xdist, a signal can end the worker."""
    code = (
        "import pathlib; from tests.fuzz import driver; from tests.fuzz.test_fuzz import Stub\n"
        "try: driver.attempt(Stub, b's', pathlib.Path(), 0.1)\n"
        "except driver.TooSlow as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "more than 0.1 s\n", done.stderr


def test_a_run_counts_what_happens_and_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "load", lambda _name: Stub)
    monkeypatch.setattr(driver, "limit_memory", lambda: None)
    inputs = [b"good", b"refused", b"broken", b"bad"]
    monkeypatch.setattr(driver, "input_of", lambda _seeds, _seed, number: inputs[number])
    summary = driver.run("stub", range(4), seed=0, seconds=60)
    assert (summary.executions, summary.accepted, summary.refused) == (4, 1, 1)
    assert [(found.kind, found.number, found.count) for found in summary.findings] == [("KeyError", 2, 2)]


def test_inputs_are_known_by_seed_and_number() -> None:
    seeds = [b'{"a": [1, 2.5, "b"], "c": {"d": null}}', b'a = 1\nb = ["c"]\n', b"\x89PNG\r\n\x1a\n" + bytes(64)]
    inputs = [driver.input_of(seeds, 3, number) for number in range(300)]
    assert inputs == [driver.input_of(seeds, 3, number) for number in range(300)]
    assert inputs[:3] == seeds
    assert len(set(inputs)) > 250
    assert inputs[3:] != [driver.input_of(seeds, 4, number) for number in range(3, 300)]


def guided(*command: str) -> subprocess.CompletedProcess[str]:
    """A guided run, in a process of its own, which libFuzzer ends."""
    pytest.importorskip("atheris", reason="needs atheris, for CPython 3.11 to 3.13 on x86-64 Linux")
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("name", ["recipe", pytest.param("image", marks=pytest.mark.long)])
def test_a_guided_run_goes_where_no_seed_did(name: str) -> None:
    done = guided("-m", "tests.fuzz.guided", name, "--executions", "400", "--seconds", "60")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["executions"] == 400
    assert summary["findings"] == []
    assert summary["accepted"] > 0
    # "NEW" is an input that reached a branch which none before it had; without watched code there is none.
    assert re.search(r"^#\d+\s+NEW ", done.stderr, re.MULTILINE), done.stderr


def guided_stub(seed: bytes, *arguments: str, hung_seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """A guided run of `Stub` from one input."""
    code = (
        "from tests.fuzz import driver, guided; from tests.fuzz.test_fuzz import Stub\n"
        f"Stub.seeds = lambda place: [{seed!r}]; driver.load = lambda name: Stub\n"
        f"driver.limit_memory = lambda: None; guided.HUNG_SECONDS = {hung_seconds}; guided.main()"
    )
    return guided("-c", code, "stub", "--executions", "20", "--seconds", "60", *arguments)


def test_a_guided_run_says_what_broke(tmp_path: Path) -> None:
    done = guided_stub(b"bad", "--found", str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr
    assert "KeyError" in {found["kind"] for found in json.loads(done.stdout)["findings"]}
    assert any(path.read_bytes()[:1] == b"b" for path in (tmp_path / "found").iterdir())


def test_a_guided_run_ends_where_compiled_code_hangs() -> None:
    done = guided_stub(b"hang", hung_seconds=1)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "test_fuzz.py" in done.stderr


def test_targets_are_found() -> None:
    assert {"manifest", "calibration", "recipe"} <= set(names())
    for name in names():
        assert callable(load(name).one)
