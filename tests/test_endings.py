"""Rows that have ended leave the batch, and those that stay answer as alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import BuildBundle, noise_images
from vtexport.runtime.generate import Generation
from vtexport.runtime.request import Decoding, Request, Result
from vtexport.runtime.runner import Runner
from vtexport.targets import get_target

#: prompts of six lengths, with the image in six places
QUESTIONS = (
    "how many?",
    "what digit is red, and where is the 3 beside <image> it?",
    "<image> where?",
    "what?",
    "tell me, in your own words and at some length, what is in <image> and why",
    "where is the seven, and what colour is it, please?",
)
NEW_TOKENS = 12
TARGETS = ("onnxruntime", "openvino")
BUILDS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "keep": 1.0},
    "sparsevlm": {"method": "sparsevlm", "keep": 0.6},
    "original positions": {"method": "sparsevlm", "keep": 0.6, "method_options": {"positions": "original"}},
    "a ranking given": {"method": "dense", "keep": 1.0, "give_ranking": True},
}


class Asked:
    """A bundle, six requests, and what each generates alone without any end token."""

    def __init__(self, bundle: Path) -> None:
        self.runner = Runner.open(bundle)
        pairs = zip(noise_images(len(QUESTIONS)), QUESTIONS, strict=True)
        self.requests = [self.runner.request(picture, question) for picture, question in pairs]
        self.alone = [self.answer(self.runner.engine, [request], ()).results[0] for request in self.requests]

    def answer(self, engine: Any, requests: Sequence[Request], ends: Sequence[int]) -> Generation:
        decoding = Decoding(NEW_TOKENS, 512, ends, keep_logits=True)
        generation = Generation(engine, self.runner.plan, requests, decoding)
        for given_tokens in generation:
            # Whoever listens hears of requests, whatever rows of the batch they are in by now.
            assert all(generation.results[row].token_ids[-1] == token for row, token in given_tokens.items())
        return generation

    def check(self, results: Sequence[Result], rows: Sequence[int], ends: Sequence[int]) -> None:
        """`results` are the answers of requests `rows` alone, up to their first token among `ends`."""
        for row, result in zip(rows, results, strict=True):
            alone = self.alone[row]
            assert alone.logits is not None
            assert result.logits is not None
            number = length(alone.token_ids, ends)
            assert result.token_ids == alone.token_ids[:number]
            np.testing.assert_allclose(result.logits, alone.logits[:number], atol=1e-4)


def length(tokens: Sequence[int], ends: Sequence[int]) -> int:
    """How many of `tokens` come up to the first among `ends`, and with it."""
    return next((number for number, token in enumerate(tokens, 1) if token in ends), len(tokens))


def batches(lengths: Sequence[int]) -> list[int]:
    """The size of the batch in each step, for answers of these lengths.

    Rows that have ended stay as long as copying the others would not pay: a copy reads and writes each of these once.
    """
    sizes, size = [], len(lengths)
    for step in range(1, max(lengths)):
        running, left = sum(number > step for number in lengths), NEW_TOKENS - step
        if left * (size - running) >= 2 * running:
            size = running
        sizes.append(size)
    return sizes


class Recording:
    """An engine that notes the size of every batch that it decodes, and the bytes of its cache afterwards."""

    def __init__(self, engine: Any, keeps: bool = False) -> None:
        self.engine, self.keeps = engine, keeps
        self.rows: list[int] = []
        self.bytes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def retain(self, cache: Any, rows: np.ndarray) -> bool:
        return not self.keeps and self.engine.retain(cache, rows)

    def decode(self, cache: Any, tokens: np.ndarray, length: np.ndarray, position: np.ndarray) -> np.ndarray:
        logits = self.engine.decode(cache, tokens, length, position)
        assert len(logits) == len(tokens) == length.shape[1] == position.shape[1]
        self.rows.append(len(tokens))
        self.bytes.append(cache.nbytes)
        return logits


@pytest.fixture(scope="module")
def asked(tiny_checkpoint: Path, build_bundle: BuildBundle) -> Callable[[str, str], Asked]:
    made: dict[tuple[str, str], Asked] = {}

    def get(target: str, build: str) -> Asked:
        if (target, build) not in made:
            if not get_target(target).can_run().works:
                pytest.skip(f"{target} does not run here")
            bundle = build_bundle(tiny_checkpoint, target=target, self_check=False, **BUILDS[build])
            made[target, build] = Asked(bundle)
        return made[target, build]

    return get


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_have_ended_leave_and_the_others_answer_as_alone(
    target: str, build: str, asked: Callable[[str, str], Asked]
) -> None:
    bundle = asked(target, build)
    # One row ends at its first token, another at its third, two at their fifth.
    ends = [bundle.alone[row].token_ids[number] for row, number in ((2, 0), (0, 2), (3, 4), (5, 4))]
    lengths = [length(result.token_ids, ends) for result in bundle.alone]
    assert len(set(lengths)) >= 4
    recording = Recording(bundle.runner.engine)
    answered = bundle.answer(recording, bundle.requests, ends)
    bundle.check(answered.results, range(6), ends)
    assert recording.rows == batches(lengths)
    assert len(set(recording.rows)) >= 3
    # Each row takes as much as before; in OpenVINO's state, which grows, one token more.
    sizes = np.array(recording.bytes) / np.array(recording.rows)
    assert set(np.diff(sizes)) == {0 if target == "onnxruntime" else sizes[1] - sizes[0]}
    assert recording.bytes[-1] < recording.bytes[0] / 2
    for request, result in zip(bundle.requests, answered.results, strict=True):
        (alone,) = bundle.answer(bundle.runner.engine, [request], ends).results
        assert {name: kept.tolist() for name, kept in alone.kept.items()} == {
            name: kept.tolist() for name, kept in result.kept.items()
        }
        if build == "a ranking given":
            np.testing.assert_allclose(result.ranking, alone.ranking, atol=1e-4)
        else:
            assert result.ranking is None


@given(data=st.data())
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_rows_end_when_and_whether_the_engine_lets_them_go(
    target: str, data: st.DataObject, asked: Callable[[str, str], Asked]
) -> None:
    bundle = asked(target, "sparsevlm")
    rows = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    tokens = sorted({token for row in rows for token in bundle.alone[row].token_ids})
    ends = data.draw(st.lists(st.sampled_from(tokens), max_size=6))
    recording = Recording(bundle.runner.engine, keeps=data.draw(st.booleans()))
    bundle.check(bundle.answer(recording, [bundle.requests[row] for row in rows], ends).results, rows, ends)
    lengths = [length(bundle.alone[row].token_ids, ends) for row in rows]
    assert recording.rows == ([len(rows)] * (max(lengths) - 1) if recording.keeps else batches(lengths))


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_is_reported_as_it_was_when_it_was_largest(target: str, asked: Callable[[str, str], Asked]) -> None:
    bundle = asked(target, "dense")
    ends = [result.token_ids[3] for result in bundle.alone[1:]]
    recording = Recording(bundle.runner.engine)
    answered = bundle.answer(recording, bundle.requests, ends)
    assert recording.rows[0] == 6
    assert recording.rows[-1] < 6
    assert answered.timings.cache_bytes == max(recording.bytes)
    assert recording.bytes[-1] < max(recording.bytes) / 2
