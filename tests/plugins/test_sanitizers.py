"""The CPU twins under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_twins_stay_inside_their_arrays(tmp_path: Path) -> None:
    sources = [PLUGINS / "tests" / "twins.cpp", *sorted((PLUGINS / "cpu").glob("*.cpp"))]
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-ffp-contract=off",
    ]
    program = tmp_path / "twins"
    command = ["g++", *flags, f"-I{PLUGINS}", f"-I{PLUGINS / 'include'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all twins passed"
