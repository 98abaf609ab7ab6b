"""The CPU twins under sanitizers, and the plugins under ThreadSanitizer.

Under AddressSanitizer and UndefinedBehaviorSanitizer the plugins are driven in `test_tensorrt_plugins.py`, and get random
fields and tensors in `test_fuzzing.py`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.conftest import NEEDS, RACE, SOURCE, Built, make

PLUGINS = SOURCE / "plugins"

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_gcc
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_twins_stay_inside_their_arrays(sanitizers: str, tmp_path: Path) -> None:
    """Under ThreadSanitizer, four threads compute at once."""
    sources = [PLUGINS / "tests" / "twins.cpp", *sorted((PLUGINS / "cpu").glob("*.cpp"))]
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        "-ffp-contract=off",
    ]
    program = tmp_path / "twins"
    command = ["g++", *flags, f"-I{PLUGINS}", f"-I{PLUGINS / 'include'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    threads = ["4"] if sanitizers == "thread" else []
    done = subprocess.run([program, *threads], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all twins passed"


class TestThreads:
    """The plugins over the CPU twins, made, copied and run by several threads at once."""

    pytestmark = NEEDS

    @staticmethod
    def run(built: Built, *options: str) -> subprocess.CompletedProcess[str]:
        make(built.folder.parents[1], "vtexport_threads")
        return subprocess.run(
            [built.folder / "vtexport_threads", *options], capture_output=True, text=True, check=False
        )

    def test_plugins_have_no_races(self, built: Built) -> None:
        done = self.run(built)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "no races"

    def test_a_race_is_found(self, built: Built) -> None:
        done = self.run(built, "--race")
        assert done.returncode == RACE
        assert "ThreadSanitizer: data race" in done.stderr
