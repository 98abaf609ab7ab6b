"""Benchmarks run, at tiny sizes; nothing timed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import MICRO

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.mark.long
@pytest.mark.parametrize("geometry", ["tiny", "tiny-next"])
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


@pytest.mark.long
def test_the_cpu_benchmark_measures_sides_apart(tmp_path: Path) -> None:
    """Every side in a process of its own; sides that prune alike answer alike, or it stops."""
    out = tmp_path / "cpu.json"
    command = [BENCHMARKS / "cpu.py", "--model", MICRO, "--groups", "methods", "--busy", "--json", out]
    done = subprocess.run(
        [sys.executable, *command, "--runs", "1", "--new-tokens", "3"], capture_output=True, text=True, check=True
    )
    report = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    sides = {(point["who"], point["method"]): point for point in report["points"]}
    assert set(sides) == {("hooks", "sparsevlm"), *(("onnxruntime", m) for m in ("dense", "sparsevlm", "fastervlm"))}
    for point in sides.values():
        assert 0 < point["first_token"] < point["total"]
        assert point["fastest_first_token"] == point["slowest_first_token"]
        assert point["peak_mib"] > 100
    assert {method: gain["pruning_ms"] > 0 for method, gain in report["gains"].items()} == {
        "sparsevlm": True,
        "fastervlm": True,
    }


def test_a_busy_machine_is_not_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import apart

    monkeypatch.setattr(apart, "WATCH", 0.2)
    monkeypatch.setattr(apart, "PATIENCE", 0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            with pytest.raises(SystemExit, match="other programs keep this machine"):
                apart.wait_until_quiet()
        finally:
            other.kill()


def test_a_side_that_dies_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import apart

    with pytest.raises(SystemExit, match="a side stopped with exit code 3"):
        apart.Side(["-c", "raise SystemExit(3)"], 1)


def test_medians_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import apart

    answers = [{"first_token": t, "per_token": 1.0, "peak_mib": t, "tokens": [1]} for t in (3.0, 9.0, 4.0)]
    found = apart.summary(answers)
    assert (found["first_token"], found["fastest_first_token"], found["slowest_first_token"]) == (4.0, 3.0, 9.0)
    assert found["peak_mib"] == 4.0
