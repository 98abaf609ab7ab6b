"""Bundles and checkpoints that several tests share; each is made once a session."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.checkpoints import MICRO, random_checkpoint
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.cli import main as cli
from vtexport.micro import heldout
from vtexport.runtime.generate import generate
from vtexport.runtime.request import Decoding, Request, Result
from vtexport.runtime.runner import Runner

BuildBundle = Callable[..., Path]

# `make test` tries fifty examples of every property, in CI always the same ones; `make test-all` tries a thousand.
settings.register_profile("sample", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile("sample")
# Tests run in as many processes as there are cores (pytest-xdist): one thread each.
torch.set_num_threads(1)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run have."""
    own = factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session")
def build_bundle(tmp_path_factory: pytest.TempPathFactory) -> BuildBundle:
    """Builds a bundle, or hands out the one that any process of the test run built before with the same options."""
    bundles = shared_folder(tmp_path_factory) / "bundles"
    bundles.mkdir(exist_ok=True)

    def get(model: Path | str = MICRO, keep: float = 0.25, method: str = "fastervlm", **more: object) -> Path:
        options = BuildOptions(str(model), keep, method, **{"dtype": "fp32", **more})  # type: ignore[arg-type]
        out = bundles / hashlib.sha256(repr(options).encode()).hexdigest()[:16]
        with FileLock(out.with_suffix(".lock")):
            if not out.is_dir():
                build(options, out)
        return out

    return get


@pytest.fixture(scope="session")
def micro_bundle(build_bundle: BuildBundle) -> Path:
    """micro-llava, fastervlm, keep 0.25, onnxruntime, fp32. Tests read it only."""
    return build_bundle()


@pytest.fixture(scope="session")
def micro_runner(micro_bundle: Path) -> Runner:
    return Runner.open(micro_bundle)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA small enough to build in seconds."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out image as a file."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(next(heldout.examples()).image).save(path)
    return path


@pytest.fixture
def bundle_copy(micro_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the micro bundle that a test may damage."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(micro_bundle, copy)
    return copy


def noise_images(count: int, size: tuple[int, int] = (120, 90), seed: int = 7) -> list[Image.Image]:
    """Random images, each with structure: coarse noise enlarged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 9, 12, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in coarse]


def greedy(runner: Runner, requests: Sequence[Request], new_tokens: int) -> list[Result]:
    """Answers to one batch with their logits, cut short by no end token."""
    decoding = Decoding(new_tokens, runner.bundle.manifest.model.max_positions, keep_logits=True)
    return generate(runner.engine, runner.plan, requests, decoding)[0]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def vtexport(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the command in this process, in an empty folder, through the entry point that users have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["vtexport", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def check_refused(outcome: Outcome, message: str, folder: Path, left: Sequence[str] = ()) -> None:
    """One line on stderr, exit code 2, nothing on stdout, nothing new in the folder."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert message in outcome.err
    assert sorted(path.name for path in folder.iterdir()) == sorted(left)
