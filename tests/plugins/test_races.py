"""The CUDA kernels under ThreadSanitizer, every thread of a block a thread of the operating system."""

from __future__ import annotations

import subprocess

import pytest

from tests.plugins.conftest import NEEDS, RACE, Built, make

pytestmark = [*NEEDS, pytest.mark.long]


def run(built: Built, *options: str) -> subprocess.CompletedProcess[str]:
    make(built.folder.parents[1], "vtexport_races")
    command = [built.folder / "vtexport_races", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


@pytest.mark.parametrize("missing", ["--block", "--warp"])
def test_a_barrier_that_is_missing_is_found(built: Built, missing: str) -> None:
    assert run(built, "--sound").returncode == 0
    done = run(built, missing)
    assert done.returncode == RACE
    assert "ThreadSanitizer: data race" in done.stderr


def test_kernels_have_no_races(built: Built) -> None:
    done = run(built)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no races"
