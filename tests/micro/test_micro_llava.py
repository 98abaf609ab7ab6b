"""micro-llava itself: a real checkpoint that has learnt its task, and what pruning does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle, greedy
from vtexport.measure.evaluate import evaluate
from vtexport.micro import heldout
from vtexport.models import read_spec
from vtexport.pruning import dense_plan
from vtexport.pruning.flops import plan_flops
from vtexport.runtime.runner import Runner


@pytest.fixture(scope="module")
def questions(pytestconfig: pytest.Config) -> int:
    """How many held-out questions are asked: a third of them, in `make test-all` all."""
    return heldout.NUM_QUESTIONS // (3 if pytestconfig.getoption("markexpr") else 1)


@pytest.fixture(scope="module")
def accuracy(build_bundle: BuildBundle, questions: int):
    """Accuracy on the held-out questions, measured once for each plan."""
    known: dict[tuple[str, float], float] = {}

    def measure(method: str, keep: float) -> float:
        if (method, keep) not in known:
            runner = Runner.open(build_bundle(MICRO, keep, method))
            known[method, keep] = evaluate(runner, questions).accuracy
        return known[method, keep]

    return measure


def test_transformers_loads_it_without_custom_code_and_it_answers() -> None:
    processor = AutoProcessor.from_pretrained(MICRO)
    model = LlavaForConditionalGeneration.from_pretrained(MICRO, dtype=torch.float32)
    right = 0
    for example in heldout.examples(20):
        content = [{"type": "image"}, {"type": "text", "text": example.question.text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=Image.fromarray(example.image), text=prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6)
        right += processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == (
            example.question.answer
        )
    assert right >= 17


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in MICRO.glob("*.safetensors")) <= 10_000_000


def test_dense_accuracy_and_what_the_questions_alone_give_away(accuracy, build_bundle: BuildBundle) -> None:
    assert accuracy("dense", 1.0) >= 0.95
    blank = evaluate(Runner.open(build_bundle(MICRO, 1.0, "dense")), 200, blank=True)
    assert blank.accuracy <= 0.35


def test_fastervlm_keeps_nine_tenths_of_dense_accuracy_at_fifteen_percent(accuracy) -> None:
    assert accuracy("fastervlm", 0.15) >= 0.9 * accuracy("dense", 1.0)


@pytest.mark.parametrize(
    ("positions", "share"), [("compact", 0.96), pytest.param("original", 0.965, marks=pytest.mark.long)]
)
def test_sparsevlm_keeps_most_of_dense_accuracy_at_a_third(
    positions: str, share: float, accuracy, questions: int, build_bundle: BuildBundle
) -> None:
    # The paper's headline is 54 % fewer decoder FLOPs at 97 % of the accuracy; benchmarks/RESULTS.md has the figures,
    # and here is room for what another processor's rounding may flip.
    runner = Runner.open(build_bundle("micro-llava", 0.33, "sparsevlm", method_options={"positions": positions}))
    spec = read_spec(runner.bundle.processor_folder)
    less, full = (plan_flops(spec, plan, 13).prefill for plan in (runner.plan, dense_plan(runner.plan)))
    assert less <= 0.46 * full
    assert evaluate(runner, questions).accuracy >= share * accuracy("dense", 1.0)


def test_sparsevlms_raters_are_the_questions_own_words(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(debug=True, method="sparsevlm"))
    image = Image.fromarray(next(heldout.examples()).image)
    for question, words in (
        ("what digit is red?", {"what", "digit", "red"}),
        ("how many digits are there?", {"how", "many", "digits", "there"}),
    ):
        request = runner.request(image, question)
        (result,) = greedy(runner, [request], 1)
        tokens = np.array(request.prompt.token_ids)[result.debug["raters"]]
        assert {runner.prompter.tokenizer.decode([token]).strip() for token in tokens} == words


@pytest.mark.parametrize(
    "keep", [pytest.param(0.5, marks=pytest.mark.long), 0.15, pytest.param(0.05, marks=pytest.mark.long)]
)
def test_fastervlm_beats_random(accuracy, keep: float) -> None:
    assert accuracy("fastervlm", keep) > accuracy("random", keep)


def test_a_limit_out_of_range_is_refused(micro_runner: Runner) -> None:
    from vtexport.errors import InputError

    for limit in (0, -1, heldout.NUM_QUESTIONS + 1):
        with pytest.raises(InputError, match="--limit"):
            evaluate(micro_runner, limit)
