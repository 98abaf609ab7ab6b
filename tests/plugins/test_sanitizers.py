"""The CPU twins and their Python module under sanitizers, and the plugins under ThreadSanitizer.

Under AddressSanitizer and UndefinedBehaviorSanitizer the plugins are driven in `test_tensorrt_plugins.py`, and get random
fields and tensors in `test_fuzzing.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.conftest import NEEDS, RACE, SOURCE, Built, configure, make

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


MODULE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import _native
kernels = _native.Kernels()
random = np.random.default_rng(3)

def score(**odd):
    arrays = {"query": np.ones((2, 4, 3, 5), np.float32), "key": np.ones((2, 2, 7, 5), np.float32),
              "places": np.full((2, 3), 6), "start": np.array([1, 2]), "divisor": None,
              "score": np.zeros((2, 4), np.float32), "scale": 0.3, "heads": 0}
    kernels.token_score(**{**arrays, **odd})

def select(**odd):
    arrays = {"hidden": np.ones((2, 8, 5), np.float16), "score": random.random((2, 8), np.float32),
              "kept": np.zeros((2, 3, 5), np.float16), "index": np.zeros((2, 3), np.int32),
              "rank": np.zeros((2, 8), np.int32)}
    kernels.token_select(**{**arrays, **odd})

def recycle(**odd):
    arrays = {"hidden": random.random((2, 8, 5), np.float32), "rank": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
              "merged": np.zeros((2, 2, 5), np.float32), "centres": np.zeros((2, 2), np.int32),
              "cluster": np.zeros((2, 8), np.int32), "keep": 3, "pool": 4, "paper": False}
    kernels.token_recycle(**{**arrays, **odd})

far = np.iinfo(np.int64)
sound = [(score, {}), (score, {"places": np.full((2, 3), far.max)}), (score, {"start": np.array([far.max, far.min])}),
         (score, {"heads": 2, "divisor": np.zeros((2, 3, 4), np.float32)}), (select, {}), (recycle, {}),
         (select, {"score": np.full((2, 8), np.nan, np.float32)}), (recycle, {"paper": True}),
         (recycle, {"rank": np.full((2, 8), 4, np.int32)})]
for call, odd in sound:
    call(**odd)
wrong = 0
for call, names in ((score, ("query", "key", "places", "start", "score")), (select, ("hidden", "score", "kept", "index", "rank")),
                    (recycle, ("hidden", "rank", "merged", "centres", "cluster"))):
    for name in names:
        for value in (None, np.zeros(0, np.float32), np.zeros((1, 1), np.int32), np.zeros((2, 9), np.float32),
                      np.zeros((2, 8, 4), np.float32), np.zeros((3, 3, 5), np.float16), np.zeros((2, 3), np.int64)[:, ::2],
                      np.zeros((2, 4, 3, 6), np.float32), np.zeros((1, 4, 3, 5), np.float32), np.zeros(1, np.int64)):
            try:
                call(**{name: value})
            except (TypeError, ValueError):
                wrong += 1
            else:
                raise SystemExit(f"{call.__name__} took {name} = {value!r}")
for call, odd in ((recycle, {"keep": -1}), (recycle, {"pool": 9}), (recycle, {"pool": 2**31 - 1, "keep": 2**31 - 1}),
                  (score, {"heads": 5, "divisor": np.ones((2, 3, 4), np.float32)}), (score, {"heads": 1})):
    try:
        call(**odd)
    except ValueError:
        wrong += 1
print("refused", wrong)
"""


@needs_gcc
@pytest.mark.long
def test_the_python_module_stays_inside_its_arrays(tmp_path: Path) -> None:
    """Called with arrays of every wrong shape, dtype and layout."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    configure(tmp_path, CMAKE_CXX_FLAGS=flags, VTEXPORT_TWINS="ON", VTEXPORT_CUDA="OFF")
    make(tmp_path, "_native")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Python itself leaves memory to the system at its end.
    environment = {**os.environ, "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", MODULE, tmp_path / "plugins"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "refused 155"
