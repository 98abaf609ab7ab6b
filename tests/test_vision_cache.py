"""Recent images skip the vision tower, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import noise_images
from vtexport.runtime.runner import Runner
from vtexport.targets.engine import VisionInput, VisionOutput

QUESTIONS = ("what digit is red?", "where is the 3?")


def counted(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every call of the vision graph, as they come."""
    calls: list[int] = []
    run = runner.engine.vision

    def vision(inputs: VisionInput) -> VisionOutput:
        calls.append(len(inputs.pixel_values))
        return run(inputs)

    monkeypatch.setattr(runner.engine, "vision", vision)
    return calls


def same(left: Any, right: Any) -> bool:
    return (left.text, left.token_ids, left.stages) == (right.text, right.token_ids, right.stages)


def test_each_image_is_looked_at_once(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, runner = Runner.open(micro_bundle, vision_cache=0), Runner.open(micro_bundle)
    seen, every = counted(runner, monkeypatch), counted(plain, monkeypatch)
    first, second, third = noise_images(3)
    batches = [
        [(first, QUESTIONS[0]), (second, QUESTIONS[0]), (first, QUESTIONS[1])],
        [(second, QUESTIONS[1]), (third, QUESTIONS[0])],
        [(first, QUESTIONS[0])],
    ]
    for batch in batches:
        for mine, wanted in zip(runner.ask(batch, 6), plain.ask(batch, 6), strict=True):
            assert same(mine, wanted)
    assert seen == [2, 1]
    assert every == [3, 2, 1]
    assert "".join(runner.stream(first, QUESTIONS[1], 6)) == "".join(plain.stream(first, QUESTIONS[1], 6))
    assert seen == [2, 1]


def test_it_is_bounded_and_forgets_what_was_used_longest_ago(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise_images(3)
    unbounded = Runner.open(micro_bundle)
    unbounded.ask([(images[0], QUESTIONS[0])], 1)
    one = unbounded._vision._bytes
    assert one > 0
    runner = Runner.open(micro_bundle, vision_cache=2 * one)
    seen = counted(runner, monkeypatch)
    for number in (0, 1, 0, 2, 0, 1):
        runner.ask([(images[number], QUESTIONS[0])], 1)
        assert runner._vision._bytes <= 2 * one
    assert len(seen) == 4
    tight = Runner.open(micro_bundle, vision_cache=one - 1)
    seen = counted(tight, monkeypatch)
    for _ in range(2):
        tight.ask([(images[0], QUESTIONS[0])], 1)
    assert len(seen) == 2
    assert tight._vision._bytes == 0


def test_what_is_kept_is_not_what_the_engine_hands_out(micro_bundle: Path) -> None:
    runner = Runner.open(micro_bundle)
    request = runner.request(noise_images(1)[0], QUESTIONS[0])
    first = runner._vision.look(runner.engine, runner.plan, [request])
    expected = first.seen().visual.copy()
    first.seen().visual[:] = np.nan
    np.testing.assert_array_equal(runner._vision.look(runner.engine, runner.plan, [request]).seen().visual, expected)


def test_outputs_on_a_device_are_left_there(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner.open(micro_bundle)
    run = runner.engine.vision

    def on_a_device(inputs: VisionInput) -> VisionOutput:
        arrays: dict[str, Any] = {name: torch.from_numpy(array) for name, array in run(inputs).arrays.items()}
        return VisionOutput(arrays)

    monkeypatch.setattr(runner.engine, "vision", on_a_device)
    seen = counted(runner, monkeypatch)
    request = runner.request(noise_images(1)[0], QUESTIONS[0])
    for _ in range(2):
        found = runner._vision.look(runner.engine, runner.plan, [request, request])
        assert all(isinstance(array, torch.Tensor) and len(array) == 2 for array in found.arrays.values())
    # The first call learns that they stay there; no later one looks twice.
    assert seen == [1, 2, 2]
