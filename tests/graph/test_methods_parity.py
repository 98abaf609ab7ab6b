"""Every method, compiled, against its plain reference: kept indices, raters, clusters, logits, 64 greedy tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import MICRO, random_checkpoint
from tests.conftest import BuildBundle, greedy, noise_images
from tests.graph.test_parity import GEOMETRIES, QUESTIONS
from tests.reference import llava, methods
from vtexport.micro import heldout
from vtexport.runtime.request import Result
from vtexport.runtime.runner import Runner

NEW_TOKENS = 64
# Five layers, so that three can prune; distances that sparsevlm-plus can weigh.
DEEPER = {"num_hidden_layers": 5, "max_position_embeddings": 256}
CHOSEN = ("grouped-heads", "one-kv-head-full", "odd-sizes", "biases", "llama3-rope")
MODELS = ("micro", *CHOSEN)

DECODER: dict[str, dict[str, Any]] = {
    "sparsevlm": {"recycle": (0.3, 0.1)},
    "sparsevlm-plus": {"plus": True, "positions": "original"},
    "fastv": {"rows": "last", "positions": "original"},
    "pyramiddrop": {"rows": "last", "attention": "next"},
    "exit": {"rows": "last"},
}
VISION = ("fastervlm", "vtc-cls", "vispruner", "visionzip", "divprune")


def pairs(methods: Iterable[str]) -> list[Any]:
    """Every method on every model; `make test` has each method on micro-llava and on one geometry, and each geometry."""
    return [
        pytest.param(method, model, marks=() if model in ("micro", CHOSEN[number % len(CHOSEN)]) else pytest.mark.long)
        for number, method in enumerate(methods)
        for model in MODELS
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint and its reference model by the name of its geometry; each made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = MICRO
            if name != "micro":
                config = dict(GEOMETRIES[name])
                text = {**DEEPER, **config.pop("text", {})}
                folder = random_checkpoint(tmp_path_factory.mktemp(name), seed=11, text=text, **config)
            made[name] = folder, llava.load(folder)
        return made[name]

    return get


def compiled(build_bundle: BuildBundle, folder: Path, method: str, keep: float, **options: Any):
    """The runner of a bundle, four requests that differ in length and place of the image, and their results."""
    runner = Runner.open(
        build_bundle(
            folder,
            keep,
            method,
            method_options=options,
            debug=method != "exit" and method != "divprune",
            self_check=False,
        )
    )
    images = noise_images(4, seed=6)
    if folder == MICRO:
        images = [Image.fromarray(example.image) for example in heldout.examples(16)][::4]
    requests = [runner.request(image, text) for image, text in zip(images, QUESTIONS, strict=True)]
    return runner, requests, greedy(runner, requests, NEW_TOKENS)


def check_answer(result: Result, trace: methods.Trace) -> None:
    wanted = torch.stack(trace.logits).numpy()
    assert np.abs(result.logits - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    assert result.token_ids == trace.tokens


def check_decoder(runner: Runner, requests, results, model, scheme: methods.Scheme, visual) -> None:
    decoder = methods.Decoder(model)
    for request, result, tokens in zip(requests, results, visual, strict=True):
        trace = decoder.generate(request.prompt, tokens, scheme, NEW_TOKENS)
        for layer, stage in runner.plan.decoder_stages.items():
            if stage.carried:
                assert result.kept[stage.where].tolist() == trace.kept[layer]
                np.testing.assert_allclose(
                    result.debug[f"score.{stage.where}"], trace.score[layer], rtol=1e-3, atol=1e-6
                )
            if stage.recycled:
                cluster = result.debug[f"cluster.{stage.where}"]
                assert {i: int(c) for i, c in enumerate(cluster) if c >= 0} == trace.clusters[layer]
        if "raters" in result.debug:
            found = np.flatnonzero(result.debug["raters"]) - request.prompt.image_positions[0]
            assert found.tolist() == trace.raters
        check_answer(result, trace)


@pytest.mark.parametrize(("method", "name"), pairs(DECODER))
def test_a_decoder_stage_is_its_reference(method: str, name: str, checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint(name)
    runner, requests, results = compiled(build_bundle, folder, method, 0.6 if method != "exit" else 0.5)
    scheme = methods.Scheme({layer: s.kept for layer, s in runner.plan.decoder_stages.items()}, **DECODER[method])
    visual = [llava.visual_tokens(model, torch.from_numpy(r.views.pixels), None)[0] for r in requests]
    check_decoder(runner, requests, results, model, scheme, visual)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"merge": "sum"}, {"paper": True}),
        ({"positions": "original"}, {"positions": "original"}),
        ({"recycle": 0}, {"recycle": None}),
        ({"recycle_pool": 0.5, "recycle_clusters": 0.4, "layers": "0,3"}, {"recycle": (0.5, 0.4)}),
    ],
    ids=["sum", "original", "no-recycle", "fractions"],
)
def test_sparsevlms_options_do_what_they_say(options, changes, checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint("grouped-heads")
    runner, requests, results = compiled(build_bundle, folder, "sparsevlm", 0.6, **options)
    settings = {**DECODER["sparsevlm"], **changes}
    scheme = methods.Scheme({layer: s.kept for layer, s in runner.plan.decoder_stages.items()}, **settings)
    visual = [llava.visual_tokens(model, torch.from_numpy(r.views.pixels), None)[0] for r in requests]
    check_decoder(runner, requests, results, model, scheme, visual)


def pruned_by_reference(method: str, model, runner: Runner, pixels: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Kept patches, and the projected tokens [K, C] without leading ones."""
    tower, project = methods.tower_of(model, pixels), model.model.multi_modal_projector
    patches, budget = tower.features[1:], runner.plan.patch_budget
    with torch.inference_mode():
        if method == "visionzip":
            stage = runner.plan.vision_stage
            kept, made = methods.visionzip(tower, budget - stage.recycled, stage.recycled)
            return kept, project(torch.cat([patches[kept], made]))
        if method == "divprune":
            kept = methods.divprune(project(patches), budget)
        elif method == "vispruner":
            kept = methods.vispruner(tower, budget, 0.5)
        elif method == "vtc-cls":
            kept = methods.vtc_cls(tower, budget, len(tower.rows) // 2)
        else:
            kept = methods.fastervlm(tower, budget)
        return kept, project(patches[kept])


@pytest.mark.parametrize(("method", "name"), pairs(VISION))
def test_a_vision_stage_is_its_reference(method: str, name: str, checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint(name)
    # micro-llava's visual tokens lie in some twenty dimensions: of many, what tells the last apart is rounding.
    runner, requests, results = compiled(build_bundle, folder, method, 0.1 if folder == MICRO else 0.4)
    decoder, leading = methods.Decoder(model), runner.plan.leading
    for request, result in zip(requests, results, strict=True):
        pixels = torch.from_numpy(request.views.pixels)
        kept, tokens = pruned_by_reference(method, model, runner, pixels)
        assert result.kept["vision"].tolist() == [*range(leading), *(i + leading for i in kept)]
        if leading:
            tokens = torch.cat([llava.visual_tokens(model, pixels, np.array([0]))[0], tokens])
        check_answer(result, decoder.generate(request.prompt, tokens, methods.Scheme({}), NEW_TOKENS))


@pytest.mark.parametrize("name", ["grouped-heads", "one-kv-head-full"])
def test_a_combination_is_one_stage_after_the_other(name: str, checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint(name)
    runner, requests, results = compiled(build_bundle, folder, "fastervlm+sparsevlm", 0.5)
    plan = runner.plan
    assert plan.vision_tokens < plan.num_visual_tokens
    assert plan.decoder_stages
    scheme = methods.Scheme({layer: s.kept for layer, s in plan.decoder_stages.items()}, recycle=(0.3, 0.1))
    visual = []
    for request in requests:
        pixels = torch.from_numpy(request.views.pixels)
        _kept, tokens = pruned_by_reference("fastervlm", model, runner, pixels)
        if plan.leading:
            tokens = torch.cat([llava.visual_tokens(model, pixels, np.array([0]))[0], tokens])
        visual.append(tokens)
    check_decoder(runner, requests, results, model, scheme, visual)


def test_a_bundle_ranks_what_its_decoder_attended_to(checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint("grouped-heads")
    bundle = build_bundle(folder, 1.0, "dense", give_ranking=True, self_check=False)
    runner = Runner.open(bundle)
    requests = [runner.request(image, text) for image, text in zip(noise_images(4, seed=6), QUESTIONS, strict=True)]
    results, _ = runner.generate(requests, runner.decoding(12))
    for request, result in zip(requests, results, strict=True):
        visual = llava.visual_tokens(model, torch.from_numpy(request.views.pixels), None)[0]
        trace = methods.Decoder(model).generate(request.prompt, visual, methods.Scheme({}), len(result.token_ids))
        assert trace.tokens == result.token_ids
        np.testing.assert_allclose(result.ranking, trace.ranking.numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["grouped-heads", "odd-sizes"])
def test_sgl_keeps_what_it_was_told_to(name: str, checkpoint, build_bundle: BuildBundle) -> None:
    folder, model = checkpoint(name)
    runner = Runner.open(build_bundle(folder, 0.5, "sgl"))
    (layer, stage), *_ = runner.plan.decoder_stages.items()
    rankings = np.random.default_rng(5).random((4, stage.tokens_in), dtype=np.float32)
    requests = [
        replace(runner.request(image, text), extras={"ranking": ranking})
        for image, text, ranking in zip(noise_images(4, seed=6), QUESTIONS, rankings, strict=True)
    ]
    assert runner.given == ["ranking"]
    results = greedy(runner, requests, NEW_TOKENS)
    for request, ranking, result in zip(requests, rankings, results, strict=True):
        scheme = methods.Scheme({layer: stage.kept}, given=torch.from_numpy(ranking), positions="original")
        visual = llava.visual_tokens(model, torch.from_numpy(request.views.pixels), None)[0]
        trace = methods.Decoder(model).generate(request.prompt, visual, scheme, NEW_TOKENS)
        assert result.kept[stage.where].tolist() == trace.kept[layer]
        check_answer(result, trace)
