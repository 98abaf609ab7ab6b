"""Every family against transformers: dense answers token for token, pruned ones against a plain reference."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.image_processing_utils import select_best_resolution
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from tests.checkpoints import family_checkpoint
from tests.conftest import BuildBundle, greedy, noise_images
from tests.reference import methods
from vtexport.models.spec import ViewChoice
from vtexport.pruning.calibration import Calibration
from vtexport.runtime.request import Request, Result
from vtexport.runtime.runner import Runner

NEW_TOKENS = 32
QUESTION = "what digit is red?"


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what was asked of its views; `size` bounds images' sides."""

    checkpoint: str
    asked: ViewChoice = field(default_factory=ViewChoice)
    size: tuple[int, int] = (20, 160)


CASES = {
    "next-vicuna-2x2": Case("llava_next-vicuna", ViewChoice(grid="2x2")),
    "next-mistral-1x2": Case("llava_next-mistral", ViewChoice(grid="1x2")),
    "next-llama3-3x1": Case("llava_next-llama3", ViewChoice(grid="3x1")),
    "next-two-images": Case("llava_next-mistral", ViewChoice(grid="2x1", images=2)),
    "video": Case("video_llava"),
    "onevision-2x2": Case("llava_onevision", ViewChoice(grid="2x2")),
    "onevision-two-images": Case("llava_onevision", ViewChoice(images=2)),
    "llava-three-images": Case("llava", ViewChoice(images=3)),
}


class Model:
    """A checkpoint as transformers runs it, its processor's parts put together by hand."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.images: Any = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.config = self.model.config
        self.video = self.config.model_type == "video_llava"

    def inputs(self, pictures: list[Any]) -> dict[str, torch.Tensor]:
        """What the model takes of a prompt's pictures."""
        if self.video:
            frames = [np.asarray(frame) for frame in pictures[0]]
            processed = self.images(images=frames, return_tensors="pt")
            return {"pixel_values_videos": next(iter(processed.values()))[None]}
        nested = [pictures] if self.config.model_type == "llava_onevision" else pictures
        return dict(self.images(images=nested, return_tensors="pt"))

    def features(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The visual tokens [V, C] of each picture, as the model itself puts them together."""
        model = self.model.model
        with torch.inference_mode():
            if self.video:
                return [model.get_video_features(**inputs).pooler_output.flatten(0, 1)]
            return list(model.get_image_features(**inputs).pooler_output)

    def prompt(self, pictures: list[Any]) -> list[int]:
        part = [{"type": "video" if self.video else "image"}] * len(pictures)
        messages = [{"role": "user", "content": [*part, {"type": "text", "text": QUESTION}]}]
        return list(
            self.tokenizer(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))[
                "input_ids"
            ]
        )

    def generate(self, pictures: list[Any]) -> list[int]:
        inputs = self.inputs(pictures)
        counts = iter([len(tokens) for tokens in self.features(inputs)])
        mark = 5 if self.video else 4
        ids = [token for one in self.prompt(pictures) for token in [one] * (next(counts) if one == mark else 1)]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                suppress_tokens=None,
            )
        return [int(token) for token in out[0, len(ids) :]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a checkpoint, and transformers' model of it; each made once."""
    logging.disable_progress_bar()
    found: dict[str, tuple[Path, Model]] = {}

    def get(name: str) -> tuple[Path, Model]:
        if name not in found:
            folder = family_checkpoint(tmp_path_factory.mktemp(name), name)
            found[name] = folder, Model(folder)
        return found[name]

    return get


def pictures_of(case: Case, model: Model, count: int) -> list[list[Any]]:
    """`count` prompts' pictures of odd sizes; of a tiled model such as fit the case's grid."""
    rng = np.random.default_rng(1)
    tiles = None if case.asked.grid is None else [int(n) * 40 for n in case.asked.grid.split("x")]
    prompts = []
    while len(prompts) < count:
        pictures: list[Any] = []
        while len(pictures) < (8 if model.video else case.asked.images or 1):
            width, height = (int(n) for n in rng.integers(*case.size, 2))
            if tiles is not None:
                side = model.config.vision_config.image_size
                best = select_best_resolution((height, width), model.config.image_grid_pinpoints)
                if [n // side * 40 for n in best] != tiles:
                    continue
            pictures += noise_images(1, (width, height), seed=int(rng.integers(1 << 30)))
        prompts.append([pictures] if model.video else pictures)
    return prompts


def answers(runner: Runner, prompts: list[list[Any]]) -> tuple[list[Request], list[Result]]:
    """Answers to prompts in ragged batches of five."""
    requests = [runner.request(pictures[0] if len(pictures) == 1 else pictures, QUESTION) for pictures in prompts]
    results = []
    for start in range(0, len(requests), 5):
        results += greedy(runner, requests[start : start + 5], NEW_TOKENS)
    return requests, results


@pytest.mark.parametrize("name", CASES)
def test_dense_answers_are_transformers_token_for_token(name: str, made, build_bundle: BuildBundle) -> None:
    case = CASES[name]
    folder, model = made(case.checkpoint)
    runner = Runner.open(build_bundle(folder, 1.0, "dense", views=case.asked, self_check=False))
    prompts = pictures_of(case, model, 20)
    requests, results = answers(runner, prompts)
    for pictures, request, result in zip(prompts, requests, results, strict=True):
        own = [len(tokens) for tokens in model.features(model.inputs(pictures))]
        if request.views.rows is not None:
            assert request.views.rows.length.tolist() == own
        assert result.token_ids == model.generate(pictures)
    if case.asked.grid:
        assert len({int(r.views.rows.length.sum()) for r in requests}) > 3


@pytest.mark.parametrize(
    ("name", "method"),
    [("next-vicuna-2x2", "fastervlm+sparsevlm"), ("video", "fastervlm"), ("onevision-2x2", "sparsevlm")],
)
def test_engines_in_half_precision_pass_their_own_check(
    name: str, method: str, made, build_bundle: BuildBundle
) -> None:
    folder, _ = made(CASES[name].checkpoint)
    bundle = build_bundle(folder, 0.5, method, views=CASES[name].asked, dtype="fp16")
    found = Runner.open(bundle).bundle.manifest.verification
    assert found.samples == 4
    assert 0 < found.max_logit_error < found.tolerance


def numbered(model: Model, pictures: list[Any]) -> list[list[int]]:
    """Which token stands where in each picture's sequence, by transformers: patch p of view v is v · 25 + p, newline -1."""
    inputs = model.inputs(pictures)
    views, found = inputs["pixel_values"].shape[1], []
    for size in inputs["image_sizes"]:
        patches = torch.arange(views * 25, dtype=torch.float32).reshape(views, 25, 1)
        packed, _ = model.model.model.pack_image_features(
            [patches], [size], **_strategy(model), image_newline=torch.tensor([-1.0])
        )
        found.append([int(number) for number in packed[0][:, 0]])
    return found


def _strategy(model: Model) -> dict[str, Any]:
    if model.config.model_type == "llava_next":
        return {"vision_feature_select_strategy": "default"}
    return {"vision_aspect_ratio": model.config.vision_aspect_ratio}


def pruned_rows(model: Model, pictures: list[Any], keep: int) -> tuple[list[int], list[torch.Tensor]]:
    """FasterVLM by rows: `keep` patches a view by CLS attention, padding left out, newlines of rows that keep one.

    Returns:
        places of the kept tokens in the whole sequence, and their tokens by picture.
    """
    inputs = model.inputs(pictures)
    kept, tokens, before = [], [], 0
    for number, (order, features) in enumerate(zip(numbered(model, pictures), model.features(inputs), strict=True)):
        chosen = set()
        for view, pixels in enumerate(inputs["pixel_values"][number]):
            row = methods.tower_of(model.model, pixels[None]).rows[-1].tolist()
            there = [p for p in range(25) if view * 25 + p in order]
            chosen |= {view * 25 + there[i] for i in methods.best([row[p] for p in there], keep)}
        own, start = [], 0
        for place, token in enumerate(order):
            if token >= 0 and token in chosen:
                own.append(place)
            if token < 0:
                if any(order[i] in chosen for i in range(start, place) if order[i] >= 25):
                    own.append(place)
                start = place + 1
        kept += [before + place for place in own]
        tokens.append(features[own])
        before += len(order)
    return kept, tokens


@pytest.mark.parametrize("name", ["next-vicuna-2x2", "next-mistral-1x2", "next-two-images"])
@pytest.mark.parametrize("method", [pytest.param("fastervlm", marks=pytest.mark.long), "fastervlm+sparsevlm"])
def test_pruning_by_rows_is_its_reference(method: str, name: str, made, build_bundle: BuildBundle) -> None:
    case = CASES[name]
    folder, model = made(case.checkpoint)
    runner = Runner.open(build_bundle(folder, 0.5, method, views=case.asked, self_check=False))
    prompts = pictures_of(case, model, 10)
    requests, results = answers(runner, prompts)
    scheme = methods.Scheme({n: stage.kept for n, stage in runner.plan.decoder_stages.items()}, recycle=(0.3, 0.1))
    decoder = methods.Decoder(model.model)
    for pictures, request, result in zip(prompts, requests, results, strict=True):
        kept, tokens = pruned_rows(model, pictures, runner.plan.patch_budget)
        assert result.kept["vision"].tolist() == kept
        check(runner, result, decoder.generate(request.prompt, tokens, fitted(scheme, runner), NEW_TOKENS))


def fitted(scheme: methods.Scheme, runner: Runner) -> methods.Scheme:
    """`scheme` with the counts that the plan fixed for the most tokens that an image may have."""
    scheme.fixed = {}
    for number, stage in runner.plan.decoder_stages.items():
        pool = int(0.3 * (stage.tokens_in - stage.kept)) + 1
        scheme.fixed[number] = stage.tokens_in, pool, stage.recycled
    return scheme


def check(runner: Runner, result: Result, trace: methods.Trace) -> None:
    for layer, stage in runner.plan.decoder_stages.items():
        assert result.kept[stage.where].tolist() == trace.kept[layer]
    wanted = torch.stack(trace.logits).numpy()
    assert np.abs(result.logits - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    assert result.token_ids == trace.tokens


@pytest.mark.parametrize(
    ("name", "method", "scheme"),
    [
        ("next-vicuna-2x2", "sparsevlm", {"recycle": (0.3, 0.1)}),
        ("next-two-images", "fastv", {"rows": "last", "positions": "original"}),
        ("onevision-2x2", "sparsevlm", {"recycle": (0.3, 0.1)}),
        ("onevision-two-images", "pyramiddrop", {"rows": "last", "attention": "next"}),
        ("llava-three-images", "sparsevlm", {"recycle": (0.3, 0.1)}),
        ("llava-three-images", "sparsevlm-plus", {"plus": True, "positions": "original"}),
        ("video", "sparsevlm", {"recycle": (0.3, 0.1)}),
        ("video", "exit", {"rows": "last"}),
    ],
)
def test_pruning_inside_the_decoder_is_its_reference(
    name: str, method: str, scheme: dict[str, Any], made, build_bundle: BuildBundle
) -> None:
    case = CASES[name]
    folder, model = made(case.checkpoint)
    runner = Runner.open(build_bundle(folder, 0.6, method, views=case.asked, self_check=False))
    prompts = pictures_of(case, model, 6)
    requests, results = answers(runner, prompts)
    stages = methods.Scheme({n: stage.kept for n, stage in runner.plan.decoder_stages.items()}, **scheme)
    decoder = methods.Decoder(model.model)
    for pictures, request, result in zip(prompts, requests, results, strict=True):
        tokens = model.features(model.inputs(pictures))
        trace = decoder.generate(request.prompt, tokens, fitted(stages, runner), NEW_TOKENS)
        if method == "exit":
            assert result.token_ids == trace.tokens
        else:
            check(runner, result, trace)


@pytest.mark.parametrize("method", ["visionzip", "vispruner", "divprune", "pool", "random", "vtc-cls"])
def test_every_method_prunes_a_view_as_it_would_alone(method: str, made, build_bundle: BuildBundle) -> None:
    folder, _ = made("llava")
    three, one = (
        Runner.open(build_bundle(folder, 0.4, method, views=ViewChoice(images=count), self_check=False))
        for count in (3, 1)
    )
    pictures = noise_images(3, (60, 50), seed=8)
    (together,) = three.embed([(pictures, QUESTION)])
    for picture, tokens in zip(pictures, together.images, strict=True):
        (alone,) = one.embed([(picture, QUESTION)])
        np.testing.assert_allclose(tokens, alone.images[0], atol=1e-5)
        assert three.plan.patch_budget == one.plan.patch_budget == len(tokens)


@pytest.mark.parametrize("name", ["video", "llava-three-images"])
def test_views_one_after_the_other_are_pruned_each(name: str, made, build_bundle: BuildBundle) -> None:
    case = CASES[name]
    folder, model = made(case.checkpoint)
    runner = Runner.open(build_bundle(folder, 0.3, "fastervlm", views=case.asked, self_check=False))
    leading, each = runner.plan.leading, runner.plan.num_visual_tokens // runner.plan.views
    prompts = pictures_of(case, model, 5)
    requests, results = answers(runner, prompts)
    for pictures, request, result in zip(prompts, requests, results, strict=True):
        inputs = model.inputs(pictures)
        features = torch.cat(model.features(inputs))
        kept = []
        for view, pixels in enumerate(next(iter(inputs.values())).flatten(0, -4)):
            tower = _tower(model, pixels)
            chosen = sorted(methods.best(tower, runner.plan.patch_budget))
            kept += [view * each + i for i in [*range(leading), *(leading + p for p in chosen)]]
        assert result.kept["vision"].tolist() == kept
        share = len(kept) // len(pictures)
        tokens = [features[kept[start : start + share]] for start in range(0, len(kept), share)]
        check(
            runner,
            result,
            methods.Decoder(model.model).generate(request.prompt, tokens, methods.Scheme({}), NEW_TOKENS),
        )


def _tower(model: Model, pixels: torch.Tensor) -> list[float]:
    """CLS's attention to the patches of one view, in the layer that yields the features."""
    tower = model.model.model.video_tower if model.video else model.model.model.vision_tower
    with torch.inference_mode():
        attention = tower(pixels[None], output_attentions=True).attentions[model.config.vision_feature_layer]
    found: list[float] = attention[0, :, 0, 1:].mean(dim=0).tolist()
    return found


def test_what_a_family_cannot_do_is_refused(made, vtexport, tmp_path: Path) -> None:
    from tests.conftest import check_refused

    (following, _), (one, _) = made("llava_next-vicuna"), made("llava_onevision")
    large = tmp_path / ".large"
    large.mkdir()
    config = json.loads((one / "config.json").read_text())
    config["image_grid_pinpoints"].append([4 * 43, 3 * 43])
    (large / "config.json").write_text(json.dumps(config))
    for model, flags, message in (
        (following, "--method dense", "--grid is missing"),
        (following, "--method dense --grid 4x4", "is no grid of this model; give one of 1x2, 2x1, 2x2, 3x1"),
        (following, "--method dense --grid two", "is no grid of this model"),
        (following, "--method dense --grid 2x2 --arrangement spiral", "choose one of rows, views"),
        (following, "--method pool --keep 0.5 --grid 2x2", "add --arrangement views"),
        (following, "--method sgl --keep 0.5 --grid 2x2", "one image of one size"),
        (following, "--method dense --grid 2x2 --give-ranking", "one image of one size"),
        (following, "--method fastervlm --keep auto --grid 2x2", "give a ratio"),
        (following, "--method fastervlm --keep 0.05 --grid 2x2", "leaves no token for each of 5 views"),
        (following, "--method dense --grid 2x2 --images 0", "--images 0 is out of range"),
        (one, "--method fastervlm --keep 0.5 --grid 2x2", "reads the vision tower's CLS token, and siglip has none"),
        (one, "--method dense --grid 2x2 --images 2", "--grid has no effect with --images"),
        (large, "--method dense --grid 4x3", "has more than the 10 tiles whose features this model keeps"),
        ("micro-llava", "--method dense --grid 2x2", "--grid has no effect with a llava model"),
    ):
        check_refused(vtexport("build", "--model", model, *flags.split(), "--out", "b"), message, tmp_path, [".large"])


def test_an_image_may_have_fewer_tokens_than_a_stage_keeps(made, build_bundle: BuildBundle) -> None:
    folder, model = made("llava_next-vicuna")
    runner = Runner.open(build_bundle(folder, 0.9, "sparsevlm", views=ViewChoice(grid="2x2"), self_check=False))
    scheme = fitted(
        methods.Scheme({n: s.kept for n, s in runner.plan.decoder_stages.items()}, recycle=(0.3, 0.1)), runner
    )
    stages = list(runner.plan.decoder_stages.values())
    prompts = [noise_images(1, size, seed=2) for size in ((100, 70), (160, 150), (160, 118), (118, 160))]
    requests, results = answers(runner, prompts)
    counts = [int(request.views.rows.length.sum()) for request in requests]
    # Fewer than are kept, enough to keep but not to merge, and enough.
    assert min(counts) <= stages[0].kept < max(counts)
    for pictures, request, result in zip(prompts, requests, results, strict=True):
        tokens = model.features(model.inputs(pictures))
        check(runner, result, methods.Decoder(model.model).generate(request.prompt, tokens, scheme, NEW_TOKENS))


def test_images_of_another_grid_or_number_are_refused(made, build_bundle: BuildBundle) -> None:
    from vtexport.errors import InputError

    folder, _model = made("llava_next-vicuna")
    asked = CASES["next-vicuna-2x2"].asked
    runner = Runner.open(build_bundle(folder, 1.0, "dense", views=asked))
    with pytest.raises(
        InputError, match="cut into 1x2 tiles, and this bundle was built for 2x2; build one with --grid 1x2"
    ):
        runner.request(Image.new("RGB", (160, 80)), QUESTION)
    with pytest.raises(InputError, match="2 images were given, this model was built for 1"):
        runner.request([Image.new("RGB", (80, 80))] * 2, QUESTION)


def test_videos_are_read_from_animations_and_folders(made, tmp_path: Path) -> None:
    from vtexport.errors import InputError
    from vtexport.models.pictures import open_video

    frames = noise_images(17, (30, 20))
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03}.png")
    for source in (tmp_path / "clip.png", folder):
        found = open_video(source, 8)
        assert [np.asarray(f).tolist() for f in found] == [
            np.asarray(frames[n]).tolist() for n in (0, 2, 4, 6, 8, 10, 12, 14)
        ]
    with pytest.raises(InputError, match="has 17 frames, this model takes 18"):
        open_video(folder, 18)
    with pytest.raises(InputError, match="no such video"):
        open_video(tmp_path / "nowhere", 8)
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 64)
    with pytest.raises(InputError, match="not a readable animation"):
        open_video(tmp_path / "clip.mp4", 8)
    _, model = made("video_llava")
    assert model.video


def test_cells_of_several_views_are_where_their_tokens_came_from(made, build_bundle: BuildBundle) -> None:
    folder, model = made("llava_next-vicuna")
    case = CASES["next-vicuna-2x2"]
    runner = Runner.open(build_bundle(folder, 0.5, "fastervlm", views=case.asked, self_check=False))
    for pictures in pictures_of(case, model, 3):
        (answer,) = runner.ask([(pictures[0], QUESTION)], 2)
        (stage,) = answer.stages
        (order,) = numbered(model, pictures)
        kept, _ = pruned_rows(model, pictures, runner.plan.patch_budget)
        wanted = [order[place] for place in kept]
        assert stage.tokens_in == len(order)
        assert stage.grid == [None if n < 0 else (n // 25, n % 25 // 5, n % 5) for n in wanted]


@pytest.mark.parametrize("name", ["next-two-images", pytest.param("video", marks=pytest.mark.long)])
def test_several_views_are_profiled(name: str, made, build_bundle: BuildBundle) -> None:
    from vtexport.measure.profile import Settings, profile

    case = CASES[name]
    folder, _ = made(case.checkpoint)
    bundle = build_bundle(folder, 0.5, "fastervlm", views=case.asked, self_check=False)
    found = profile(bundle, settings=Settings(runs=1, new_tokens=2))
    assert found.this.mean_visual_tokens == Runner.open(bundle).plan.mean_visual_tokens
    assert found.this.stages["vision"].median > 0


def test_several_images_are_calibrated_together(made, build_bundle: BuildBundle, vtexport, tmp_path: Path) -> None:
    folder, _ = made("llava_next-mistral")
    files = []
    for number, image in enumerate(noise_images(4, (40, 80), seed=3)):
        image.save(tmp_path / f"{number}.png")
        files.append(f"{number}.png")
    lines = [{"image": pair, "prompt": QUESTION} for pair in (files[:2], files[2:])]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    views = ("--grid", "2x1", "--images", "2")
    outcome = vtexport("calibrate", "--model", folder, "--data", "pairs.jsonl", "-o", "ranks.toml", *views)
    assert outcome.code == 0, outcome.err
    found = Calibration.load(tmp_path / "ranks.toml")
    assert (found.pairs, found.num_visual_tokens) == (2, 2 * (3 * 25 + 10))
    # No raters x visual attention has a higher rank than it has visual tokens.
    assert all(0 < rank <= found.num_visual_tokens for rank in found.ranks)
    assert all(0 < mass < 1 for mass in found.mass)
    asked = ViewChoice(grid="2x1", images=2)
    build_bundle(folder, 0.5, "sparsevlm", views=asked, calibration=tmp_path / "ranks.toml", self_check=False)
    outcome = vtexport(
        "calibrate", "--model", folder, "--data", "pairs.jsonl", "-o", "r.toml", *views, "--method", "fastervlm"
    )
    assert outcome.code == 2
    assert "the CLS attention of a single view" in outcome.err


def test_the_picture_of_a_video_has_its_frames(made, build_bundle: BuildBundle, vtexport, tmp_path: Path) -> None:
    folder, _ = made("video_llava")
    bundle = build_bundle(folder, 0.3, "fastervlm", views=ViewChoice(), self_check=False)
    frames = noise_images(8, (30, 20))
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    outcome = vtexport("show", bundle, "--image", tmp_path / "clip.gif", "-o", "kept.png")
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > picture.height
    outcome = vtexport("run", bundle, "--image", tmp_path / "clip.gif", "--prompt", QUESTION, "--json")
    assert outcome.code == 0, outcome.err
    (stage,) = json.loads(outcome.out)["stages"]
    assert {cell[0] for cell in stage["grid"] if cell is not None} == set(range(8))
