"""Compiled engines against plain references built on transformers alone: kept indices, logits, greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import LLAMA3_ROPE, MICRO, random_checkpoint, rename_tensors
from tests.conftest import BuildBundle, greedy, noise_images
from tests.reference import fastervlm, llava
from vtexport.runtime.generate import generate
from vtexport.runtime.request import Decoding
from vtexport.runtime.runner import Runner
from vtexport.targets.engine import VisionInput

QUESTIONS = (
    "what digit is red?",
    "<image> where is the 3?",
    "tell me, in your own words and at some length, what is in <image> and why",
    "how many?",
)

# Geometries that differ where an exporter goes wrong: grouped heads, odd sizes, CLS among the tokens, feature
# layers from either end, tied embeddings, biases, activations, RoPE variants, head sizes of their own.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "grouped-heads": {},
    "all-heads": {"text": {"num_key_value_heads": 4}, "vision_feature_layer": -1},
    "one-kv-head-full": {"text": {"num_key_value_heads": 1}, "vision_feature_select_strategy": "full"},
    "odd-sizes": {
        "vision": {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 37, "image_size": 63, "patch_size": 9},
        "text": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10},
    },
    "tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "biases": {
        "text": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
        "vision": {"hidden_act": "gelu"},
    },
    "llama3-rope": {
        "text": {"rope_parameters": LLAMA3_ROPE},
        "vision_feature_layer": 2,
    },
    "yarn-rope": {
        "text": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                     "original_max_position_embeddings": 128}},
    },
}  # fmt: skip


def kept_by_reference(model: Any, runner: Runner, pixels: np.ndarray) -> np.ndarray:
    """The FasterVLM definition on transformers' attentions, as indices into the visual tokens."""
    plan = runner.plan
    scores = fastervlm.cls_scores(model, torch.from_numpy(pixels), model.config.vision_feature_layer)
    patches = np.array(fastervlm.kept_patches(scores, plan.vision_tokens - plan.leading))
    cls = np.zeros((len(patches), plan.leading), dtype=int)
    return np.concatenate([cls, patches + plan.leading], axis=1)


def test_kept_indices_are_the_definition_on_200_images(micro_runner: Runner) -> None:
    model = llava.load(MICRO)
    images = noise_images(200)
    for start in range(0, 200, 50):
        pixels = np.concatenate([micro_runner.prompter.views(image).pixels for image in images[start : start + 50]])
        np.testing.assert_array_equal(
            micro_runner.engine.vision(VisionInput(pixels)).seen().kept, kept_by_reference(model, micro_runner, pixels)
        )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_answers_as_the_reference(name: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=len(name), **GEOMETRIES[name])
    runner = Runner.open(build_bundle(folder, 0.4))
    check_against_reference(runner, llava.load(folder), new_tokens=16)


def test_micro_llava_answers_as_the_reference(micro_runner: Runner) -> None:
    check_against_reference(micro_runner, llava.load(MICRO), new_tokens=64)


def check_against_reference(runner: Runner, model: Any, new_tokens: int) -> None:
    """A ragged batch of four = four single runs = the reference fed the same kept tokens."""
    images = noise_images(4, seed=11)
    requests = [runner.request(image, text) for image, text in zip(images, QUESTIONS, strict=True)]
    assert len({(len(r.prompt.token_ids), r.prompt.image_positions[0]) for r in requests}) == 4
    batch = greedy(runner, requests, new_tokens)
    for request, result in zip(requests, batch, strict=True):
        pixels = request.views.pixels
        (alone,) = greedy(runner, [request], new_tokens)
        assert alone.token_ids == result.token_ids
        np.testing.assert_array_equal(alone.kept["vision"], result.kept["vision"])
        np.testing.assert_allclose(alone.logits, result.logits, atol=1e-4)
        kept = kept_by_reference(model, runner, pixels)
        np.testing.assert_array_equal(result.kept["vision"], kept[0])
        visual = llava.visual_tokens(model, torch.from_numpy(pixels), kept[0])
        assert result.token_ids == llava.greedy(model, request.prompt, visual, new_tokens)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_dense_is_transformers_generate(strategy: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=3, vision_feature_select_strategy=strategy)
    runner = Runner.open(build_bundle(folder, 1.0, "dense"))
    model = llava.load(folder)
    for image in noise_images(5, seed=5):
        request = runner.request(image, QUESTIONS[0])
        ids, at = list(request.prompt.token_ids), request.prompt.image_positions[0]
        whole = torch.tensor([ids[:at] + [4] * runner.plan.num_visual_tokens + ids[at:]])
        with torch.inference_mode():
            out = model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                pixel_values=torch.from_numpy(request.views.pixels),
                max_new_tokens=32,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=3,
            )
        (result,) = greedy(runner, [request], 32)
        assert result.token_ids == out[0, whole.shape[1] :].tolist()
        assert result.kept == {}


@pytest.mark.parametrize("method", ["pool", "random"])
def test_baselines_do_what_they_say(method: str, tiny_checkpoint: Path, build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(tiny_checkpoint, 0.4, method))
    model = llava.load(tiny_checkpoint)
    (image,) = noise_images(1)
    pixels = runner.prompter.views(image).pixels
    out = runner.engine.vision(VisionInput(pixels)).seen()
    with torch.inference_mode():
        layer = model.config.vision_feature_layer
        states = model.model.vision_tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        features = states[layer][:, 1:]
        if method == "pool":
            square = features.transpose(1, 2).reshape(1, -1, 5, 5)
            pooled = torch.nn.functional.adaptive_avg_pool2d(square, (3, 3))
            chosen = pooled.flatten(2).transpose(1, 2)
            assert out.kept is None
        else:
            chosen = features[:, torch.from_numpy(out.kept[0]).long()]
            assert len(set(out.kept[0].tolist())) == 10
        expected = model.model.multi_modal_projector(chosen)
    np.testing.assert_allclose(out.visual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
         "multi_modal_projector.": "model.multi_modal_projector.", "vision_tower.": "model.vision_tower.vision_model."},
        {"vision_tower.": "vision_tower.vision_model."},
    ],
    ids=["transformers-4.52", "llava-hf"],
)  # fmt: skip
def test_every_naming_of_a_checkpoint_is_read(rules: dict[str, str], tmp_path: Path) -> None:
    from vtexport.builder.build import build
    from vtexport.builder.options import BuildOptions

    folder = random_checkpoint(tmp_path / "model", seed=9)
    # In another dtype than the checkpoint's every weight is written, under our names.
    plain = build(BuildOptions(str(folder), 0.5, dtype="fp16", self_check=False), tmp_path / "plain")
    rename_tensors(folder, rules)
    renamed = build(BuildOptions(str(folder), 0.5, dtype="fp16", self_check=False), tmp_path / "renamed")
    weights = [
        [entry.sha256 for entry in bundle.manifest.files if entry.path.endswith("weights.safetensors")]
        for bundle in (plain, renamed)
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 1


def test_fp16_keeps_the_same_tokens_and_answers(build_bundle: BuildBundle) -> None:
    half = Runner.open(build_bundle(dtype="fp16"))
    full = Runner.open(build_bundle())
    requests = [full.request(image, QUESTIONS[0]) for image in noise_images(4, seed=2)]
    for one, two in zip(greedy(half, requests, 8), greedy(full, requests, 8), strict=True):
        kept = two.kept["vision"]
        assert len(np.intersect1d(one.kept["vision"], kept)) >= 0.95 * len(kept)
        assert np.abs(one.logits[0] - two.logits[0]).max() <= 0.03 * np.abs(two.logits[0]).max()


def test_a_row_ends_at_its_own_end_token(micro_runner: Runner) -> None:
    requests = [micro_runner.request(image, "what digit is red?") for image in noise_images(3, seed=4)]
    free = greedy(micro_runner, requests, 8)
    end = free[0].token_ids[1]
    decoding = Decoding(8, 2048, eos_token_ids=(end,))
    stopped, timings = generate(micro_runner.engine, micro_runner.plan, requests, decoding)
    for before, after in zip(free, stopped, strict=True):
        ids = before.token_ids
        assert after.token_ids == (ids[: ids.index(end) + 1] if end in ids else ids)
    assert len(timings.decode) == max(len(result.token_ids) for result in stopped) - 1


def test_a_sequence_beyond_the_models_positions_is_refused(micro_runner: Runner) -> None:
    from vtexport.errors import InputError

    request = micro_runner.request(noise_images(1)[0], "what digit is red?")
    with pytest.raises(InputError, match="exceed the model's 2048 positions"):
        generate(micro_runner.engine, micro_runner.plan, [request], Decoding(2048, 2048))


def test_scores_of_a_debug_build_explain_the_choice(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(debug=True))
    pixels = np.concatenate([runner.prompter.views(image).pixels for image in noise_images(3)])
    out = runner.engine.vision(VisionInput(pixels))
    for score, kept in zip(out.score, out.seen().kept, strict=True):
        assert score[kept].min() >= np.delete(score, kept).max()
