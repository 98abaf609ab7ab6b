"""Models that do not fit into memory: weights by reference, a self-check at a small width."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import random_checkpoint, random_clip, sparse_checkpoint
from tests.conftest import check_refused
from vtexport.builder import selfcheck
from vtexport.builder.build import build, dry_run
from vtexport.builder.options import BuildOptions
from vtexport.errors import VerificationError
from vtexport.runtime.runner import Runner
from vtexport.targets.engine import VisionInput

GIGABYTE = 1 << 30


# Runs a command and prints its peak resident bytes. A process begins with the peak of the one that started it: this small
# one stands between the command and the tests.
MEASURE = """
import os, sys
started = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(started, 0)
print(1024 * used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.long
def test_llava_7b_builds_in_two_gigabytes(tmp_path: Path) -> None:
    """Its names, shapes and shards; the weights are holes in sparse files."""
    checkpoint = sparse_checkpoint(tmp_path / "llava-1.5-7b", "7b")
    building = ("-m", "vtexport", "build", "--model", str(checkpoint), "--keep", "0.25", "--out", str(tmp_path / "out"))
    command = [sys.executable, "-c", MEASURE, sys.executable, *building]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) <= 2 * GIGABYTE
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["target"]["dtype"] == "fp16"
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    for name in shards:
        assert (tmp_path / "out" / "engine" / name).samefile(checkpoint / name)
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    weights = sum((checkpoint / name).stat().st_size for name in shards)
    assert sum(sizes.values()) - weights < 50_000_000
    assert manifest["verification"]["same_kept"]
    assert "a random model of the same layers" in manifest["verification"]["ran"]
    # onnx takes a file with several hard links for an attack; a bundle that was copied has none.
    for name in shards:
        link = tmp_path / "out" / "engine" / name
        link.unlink()
        (checkpoint / name).rename(link)
    for name in ("vision", "language"):
        onnx.checker.check_model(str(tmp_path / "out" / "engine" / f"{name}.onnx"))


def test_a_dry_run_needs_the_configuration_only(vtexport, tmp_path: Path) -> None:
    whole, bare = sparse_checkpoint(tmp_path / "whole", "13b"), tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(whole / "config.json", bare / "config.json")
    shown = vtexport("build", "--model", bare, "--keep", "0.25", "--dry-run")
    assert shown.code == 0
    assert "weights as they are" in shown.out
    assert "fp16" in shown.out
    assert shown.out == vtexport("build", "--model", whole, "--keep", "0.25", "--dry-run").out
    assert (
        "weights converted" in vtexport("build", "--model", bare, "--keep", "0.25", "--dtype", "fp32", "--dry-run").out
    )
    check_refused(
        vtexport("build", "--model", bare, "--keep", "0.25", "--dry-run", "--out", "x"),
        "--out has no effect with --dry-run",
        tmp_path,
        ["whole", "bare"],
    )
    found = vtexport("build", "--model", bare, "--keep", "2", "--dry-run")
    assert (found.code, found.out) == (2, "")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "available_memory", lambda: 0)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("method", ["sparsevlm", "fastervlm", "cdpruner"])
def test_what_does_not_fit_is_checked_at_a_small_width(method: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", 3, text={"num_attention_heads": 8, "num_key_value_heads": 4})
    own = {"clip": str(random_clip(tmp_path / "clip", 5, 48))} if method == "cdpruner" else {}
    bundle = build(BuildOptions(str(folder), 0.7, method, method_options=own), tmp_path / "bundle")
    found = bundle.manifest.verification
    assert found is not None
    assert found.ran == "a random model of the same layers, 64 wide, on onnxruntime"
    assert found.same_kept
    assert found.max_logit_error <= found.tolerance == 1e-4


@pytest.mark.usefixtures("no_memory")
def test_a_wrong_graph_is_found_at_a_small_width(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtexport.graph import modules

    right = modules.DecoderAttention.extend

    def wrong(self, *given):
        mixed, *cache = right(self, *given)
        return mixed * 1.01, *cache

    monkeypatch.setattr(modules.DecoderAttention, "extend", wrong)
    with pytest.raises(VerificationError, match="logits differ"):
        build(BuildOptions(str(tiny_checkpoint), 0.7), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_weights_beyond_a_files_end_are_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(BuildOptions(str(tiny_checkpoint), 0.7, self_check=False), tmp_path / "bundle")
    weights = bundle.folder / "engine" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-64])
    with pytest.raises(VerificationError, match=r"needs \d+ bytes of .*model\.safetensors has \d+ there"):
        selfcheck.check_structure(bundle.folder)


def test_a_checkpoints_own_bytes_stay_where_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(BuildOptions(str(tiny_checkpoint), 0.7, self_check=False), tmp_path / "bundle")
    linked = bundle.folder / "engine" / "model.safetensors"
    assert linked.samefile(tiny_checkpoint / "model.safetensors")
    written = load_file(bundle.folder / "engine" / "weights.safetensors")
    assert set(written) == {"rope.cos", "rope.sin"}
    # A bundle is complete: without its checkpoint, copied elsewhere, it runs.
    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    assert (
        Runner.open(copy).engine.vision(VisionInput(np.zeros((1, 3, 40, 40), np.float32))).seen().visual.shape[0] == 1
    )


def test_what_is_hard_linked_needs_no_room(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[int] = []
    monkeypatch.setattr("vtexport.builder.assemble.check_space", lambda _out, needed: wanted.append(needed))
    for dtype in ("fp32", "fp16"):
        build(BuildOptions(str(tiny_checkpoint), 0.7, dtype=dtype, self_check=False), tmp_path / dtype)
    linked, converted = wanted
    assert linked == 16 << 20 < converted


def test_a_bf16_checkpoint_becomes_fp16(tmp_path: Path) -> None:
    import torch

    folder = random_checkpoint(tmp_path / "model", 4)
    weights = folder / "model.safetensors"
    converted = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(converted, weights, metadata={"format": "pt"})
    bundle = build(BuildOptions(str(folder), 0.7, "fastervlm"), tmp_path / "bundle")
    assert bundle.manifest.target.dtype == "fp16"
    assert dry_run(BuildOptions(str(folder), 0.7, "fastervlm")).converts
    assert not (bundle.folder / "engine" / "model.safetensors").exists()
    assert bundle.manifest.verification is not None
