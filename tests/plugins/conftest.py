"""The plugin library, built once a session for every test that needs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from tests.conftest import shared_folder

SOURCE = Path(__file__).parents[2]
#: what the kernels are compiled for as machine code
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
#: the status with which ThreadSanitizer ends a program
RACE = 66


def headers() -> Path | None:
    """TensorRT's headers, from the wheel that `make test` installs."""
    spec = find_spec("kernel_lens")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "include" / "tensorrt"


#: what tests that take `built` need
NEEDS = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(headers() is None, reason="needs TensorRT's headers: pip install --no-deps kernel-lens"),
]


class Built(NamedTuple):
    """The folder of the built library, and what building it printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Warnings are errors in all of it. The processes of a test run share one build."""
    shared = shared_folder(tmp_path_factory)
    folder, printed = shared / "plugins", shared / "plugins.txt"
    with FileLock(shared / "plugins.lock"):
        if not printed.is_file():
            configure(folder)
            printed.write_text(make(folder, "vtexport_plugins"))
    return Built(folder / "plugins" / "tensorrt", printed.read_text())


def configure(folder: Path, **more: object) -> None:
    """Configure a build of the sources; `more` are settings of CMake."""
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "TENSORRT_INCLUDE": headers(),
        "nanobind_DIR": nanobind,
        "Python_EXECUTABLE": sys.executable,
        **more,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", *options], check=True)


def make(folder: Path, *targets: str) -> str:
    """Build targets in a CMake build folder; what that printed."""
    command = ["cmake", "--build", folder, "--target", *targets]
    with FileLock(folder.with_suffix(".build")):
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout
