"""A short run of the plugins' fuzz target."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.conftest import SOURCE, configure, headers, make

CUDA = Path("/usr/local/cuda/include")
#: the seeds, one of each op that runs
CORPUS = SOURCE / "plugins" / "tests" / "corpus"
#: their names; a fuzzer that gets no deeper than a refusal would find nothing
OPS = ("recycle", "score", "score_heads", "select")


def clang(folder: Path) -> str | None:
    """A clang++ that has libFuzzer's library."""
    source = folder / "target.cpp"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n')
    for name in ("clang++", *(f"clang++-{version}" for version in range(24, 13, -1))):
        if shutil.which(name) is None:
            continue
        command = [name, "-fsanitize=fuzzer,address,undefined", source, "-o", folder / "target"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return name
    return None


@pytest.mark.skipif(headers() is None, reason="needs TensorRT's headers: pip install --no-deps kernel-lens")
@pytest.mark.skipif(not (CUDA / "cuda_runtime_api.h").is_file(), reason="needs CUDA's headers")
def test_plugins_stand_any_fields_and_tensors(tmp_path: Path) -> None:
    compiler = clang(tmp_path)
    if compiler is None:
        pytest.skip("needs clang++ with libFuzzer: clang and libclang-rt-dev")
    folder = tmp_path / "build"
    configure(folder, CMAKE_CXX_COMPILER=compiler, VTEXPORT_CUDA="OFF", VTEXPORT_FUZZ="ON", CUDA_INCLUDE=CUDA)
    make(folder, "vtexport_fuzz_creation")
    assert sorted(path.name for path in CORPUS.iterdir()) == list(OPS)
    found = tmp_path / "found"
    found.mkdir()
    program = folder / "plugins" / "tests" / "vtexport_fuzz_creation"
    options = ["-runs=20000", "-max_len=256", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    # libFuzzer bounds its process's peak memory, and a process begins with the peak of the one that started it: by itself
    # a test's can be above the bound. timeout(1), which is small, starts the fuzzer in a child of its own.
    command = ["timeout", "600", program, found, CORPUS, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Done 20000 runs", done.stderr, re.MULTILINE)
