"""Prompts and messages for vLLM: their form, and vLLM's own answers where it is installed."""

from __future__ import annotations

import base64
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import MICRO, family_checkpoint, rename_tensors
from tests.conftest import BuildBundle, noise_images
from vtexport.deploy.vllm import messages, prompts, reached
from vtexport.errors import InputError
from vtexport.micro import heldout
from vtexport.models.spec import ViewChoice
from vtexport.runtime.runner import Runner

QUESTIONS = ["what digit is red?", "what color is the digit on the left?"]


def test_prompts_have_a_tensor_per_image(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False, views=ViewChoice(images=2)))
    given = prompts(runner, [(noise_images(2), QUESTIONS[0])], torch.float16)
    ((first, second),) = [prompt["multi_modal_data"]["image"] for prompt in given]
    assert first.shape == second.shape == (72, 128)
    assert first.dtype == second.dtype == torch.float16
    assert given[0]["prompt"].count("<image>") == 2


def test_messages_carry_the_same_tensors_for_the_server(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    pairs = list(zip(noise_images(2), QUESTIONS, strict=True))
    for conversation, prompt, question in zip(messages(runner, pairs), prompts(runner, pairs), QUESTIONS, strict=True):
        ((image, text),) = [message["content"] for message in conversation]
        assert text == {"type": "text", "text": question}
        assert image.keys() == {"type", "image_embeds"}
        assert image["type"] == "image_embeds"
        tensor = torch.load(io.BytesIO(base64.b64decode(image["image_embeds"], validate=True)), weights_only=True)
        assert torch.equal(tensor, prompt["multi_modal_data"]["image"][0])
    json.dumps(conversation)


def test_turns_without_images_stay_text(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    (conversation,) = messages(runner, [(noise_images(1)[0], turns)])
    assert [message["content"] for message in conversation[1:]] == ["7", QUESTIONS[1]]
    assert [part["type"] for part in conversation[0]["content"]] == ["image_embeds", "text"]


def test_pruning_inside_the_decoder_has_no_embeddings(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.4, "sparsevlm", self_check=False))
    with pytest.raises(InputError, match=r"prunes inside the decoder.*build with a vision-stage method"):
        messages(runner, [(noise_images(1)[0], QUESTIONS[0])])


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


def check_answers(folder: Path, runner: Runner, pairs: list[tuple[Any, str]]) -> None:
    """Compare vLLM's tokens, for prompts and for messages, with the bundle's own."""
    from vllm import LLM, SamplingParams

    answers = runner.ask(pairs, 12)
    llm = LLM(str(folder), enable_mm_embeds=True, dtype="float32", max_model_len=256, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=12)
    generated = llm.generate(prompts(runner, pairs), sampling)
    # As a server does for a request that asks for it: a chat template of LLaVA's begins without the first token.
    added = {"add_special_tokens": True}
    chatted = llm.chat(messages(runner, pairs), sampling, tokenization_kwargs=added)
    for outputs in (generated, chatted):
        for output, answer, (_, question) in zip(outputs, answers, pairs, strict=True):
            assert list(output.outputs[0].token_ids) == answer.token_ids
            assert reached(runner, question, len(output.prompt_token_ids)) <= runner.plan.vision_tokens


@needs_vllm
@pytest.mark.parametrize(("method", "keep"), [("fastervlm", 0.25), ("visionzip", 0.125)])
def test_vllm_answers_as_the_bundle_does(method: str, keep: float, build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, keep, method, self_check=False))
    pairs = [(Image.fromarray(example.image), example.question.text) for example in heldout.examples(12)]
    check_answers(MICRO, runner, pairs)


@needs_vllm
def test_vllm_takes_tiles(build_bundle: BuildBundle, tmp_path: Path) -> None:
    # vLLM's attention on the CPU takes no narrower heads, and its LLaVA only the older names of the tower's tensors.
    folder = family_checkpoint(tmp_path, "llava_next-vicuna", head_dim=32)
    rename_tensors(folder, {"vision_tower.": "vision_tower.vision_model."})
    runner = Runner.open(build_bundle(folder, 0.5, "fastervlm", views=ViewChoice(grid="2x2"), self_check=False))
    check_answers(folder, runner, list(zip(noise_images(2, (150, 120)), QUESTIONS, strict=True)))
