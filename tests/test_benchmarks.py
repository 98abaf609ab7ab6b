"""The benchmark that waits for a GPU runs: at a tiny geometry, on the CPU, nothing timed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize("geometry", ["tiny", pytest.param("tiny-next", marks=pytest.mark.long)])
def test_the_gpu_benchmark_measures_every_side(geometry: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    methods = ["--methods", "sparsevlm,fastervlm"]
    command = [
        sys.executable,
        SCRIPT,
        "--geometry",
        geometry,
        "--device",
        "cpu",
        *methods,
        "--runs",
        "1",
        "--json",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert [kernel["name"] for kernel in report["kernels"]] == ["token_score", "token_select", "token_recycle", "stage"]
    assert all(min(kernel["eager"], kernel["compiled"], kernel["native"]) > 0 for kernel in report["kernels"])
    names = [side["name"] for side in report["sides"]]
    assert names[0] == "dense"
    assert {name.split()[0] for name in names[1:]} == {"sparsevlm", "fastervlm"}
    assert all(name in done.stdout for name in names)
    dense, *pruned = report["sides"]
    for side in pruned:
        assert min(side["vision"], side["prefill"], side["per_token"], side["pruning"]) > 0
        assert side["cache_bytes"] < dense["cache_bytes"]
        assert side["mean_visual_tokens"] < dense["mean_visual_tokens"] / 2


def test_a_gpu_that_is_not_there_is_a_clear_error() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=hidden)
    assert done.returncode == 2
    assert "no CUDA GPU that PyTorch can use" in done.stderr
