"""cdpruner against its definition: the text tower by transformers, the subset by determinants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from tests.checkpoints import MICRO, random_checkpoint, random_clip
from tests.conftest import BuildBundle, check_refused, noise_images
from tests.graph.test_parity import GEOMETRIES, QUESTIONS
from tests.reference import llava, methods
from vtexport.errors import InputError, ModelError
from vtexport.micro import heldout
from vtexport.models.clip import ClipTokenizer, read_clip
from vtexport.models.families import read_spec
from vtexport.runtime.runner import Runner

# How the released code's relevance is scaled: the least relevant patch still has a little.
LEAST = 1e-6


def relevance(clip: CLIPModel, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[V], from patches [V, C] and the question's own tokens, unpadded."""
    embedded = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    question = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)[0]
    against = torch.stack([-row @ question / row.norm() / question.norm() for row in embedded])
    return (against - against.min() + LEAST) / (against.max() - against.min())


def most_probable(weight: torch.Tensor, tokens: torch.Tensor, budget: int) -> list[int]:
    """The greedy subset of greatest determinant of diag(weight) cos diag(weight), determinants taken anew each time.

    Tokens that the subset explains up to a thousandth add nothing; once there are no others, relevance decides.
    """
    unit = (tokens / tokens.norm(dim=1, keepdim=True)).double()
    cosines = unit @ unit.T
    spanning: list[int] = []
    chosen: list[int] = []
    while len(chosen) < budget:
        rest = [j for j in range(len(weight)) if j not in chosen]
        volume = float(torch.linalg.det(cosines[spanning][:, spanning])) if spanning else 1.0
        unexplained = {j: float(torch.linalg.det(cosines[[*spanning, j]][:, [*spanning, j]])) / volume for j in rest}
        adding = [j for j in rest if unexplained[j] > 1e-3]
        if adding:
            spanning.append(max(adding, key=lambda j: unexplained[j] * float(weight[j]) ** 2))
            chosen.append(spanning[-1])
        else:
            chosen.append(max(rest, key=lambda j: float(weight[j])))
    return sorted(chosen)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[int, int], Path] = {}

    def get(width: int, eos: int = 3) -> Path:
        if (width, eos) not in made:
            made[width, eos] = random_clip(tmp_path_factory.mktemp("clip"), 5, width, eos=eos)
        return made[width, eos]

    return get


@pytest.mark.parametrize(
    ("name", "eos", "keep"),
    # micro-llava's visual tokens lie in some twenty dimensions: few can be told apart by what they add.
    [("micro", 3, 0.1), ("grouped-heads", 2, 0.3), ("one-kv-head-full", 3, 0.3), ("odd-sizes", 3, 0.3)],
)
def test_kept_tokens_are_the_greedy_determinants(
    name: str, eos: int, keep: float, clips, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    folder = MICRO if name == "micro" else random_checkpoint(tmp_path / "llava", 11, **GEOMETRIES[name])
    clip_folder = clips(read_spec(folder).vision.hidden_size, eos)
    runner = Runner.open(build_bundle(folder, keep, "cdpruner", method_options={"clip": str(clip_folder)}, debug=True))
    model, clip = llava.load(folder), CLIPModel.from_pretrained(clip_folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    assert runner.reads_question
    images = noise_images(4, seed=6)
    if folder == MICRO:
        images = [Image.fromarray(example.image) for example in heldout.examples(16)][::4]
    requests = [runner.request(image, text) for image, text in zip(images, QUESTIONS, strict=True)]
    results, _ = runner.generate(requests, runner.decoding(4))
    leading = runner.plan.leading
    for request, text, result in zip(requests, QUESTIONS, results, strict=True):
        tower = methods.tower_of(model, torch.from_numpy(request.views.pixels))
        ids = torch.tensor([tokenizer(text.replace("<image>", " ").strip())["input_ids"]])
        with torch.inference_mode():
            weight = relevance(clip, tower.features[1:], ids)
            tokens = model.model.multi_modal_projector(tower.features[1:])
        np.testing.assert_allclose(result.debug["score.vision"], weight, rtol=1e-3, atol=1e-4)
        kept = most_probable(weight, tokens, runner.plan.patch_budget)
        assert result.kept["vision"].tolist() == [*range(leading), *(i + leading for i in kept)]


def test_the_question_decides(clips, build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.3, "cdpruner", method_options={"clip": str(clips(128))}, debug=True))
    image = Image.fromarray(next(heldout.examples()).image)
    one, other = (runner.ask([(image, text)])[0].stages[0].index for text in ("what digit is red?", "how many?"))
    assert one != other


def test_more_tokens_than_dimensions(build_bundle: BuildBundle, tmp_path: Path) -> None:
    """Behind the kernel's rank nothing adds to the determinant; the choice goes on by relevance instead of by NaN."""
    folder = random_checkpoint(tmp_path / "llava", 3, text={"hidden_size": 16, "head_dim": 16})
    clip = random_clip(tmp_path / "clip", 5, read_spec(folder).vision.hidden_size)
    runner = Runner.open(build_bundle(folder, 0.9, "cdpruner", method_options={"clip": str(clip)}))
    answer = runner.ask([(noise_images(1)[0], "what digit is red?")], 4)[0]
    index = answer.stages[0].index
    assert index == sorted(set(index))
    assert len(index) == runner.plan.vision_tokens > 16


def test_what_it_refuses(vtexport, clips, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = ("build", "--model", "micro-llava", "--keep", "0.5", "--out", "out")
    for more, message in {
        ("--method", "cdpruner"): "needs CLIP's text tower, which LLaVA checkpoints do not carry; give",
        ("--method", "cdpruner", "--clip", str(tmp_path / "nowhere")): "unknown model",
        ("--method", "cdpruner", "--clip", str(tiny_checkpoint)): "holds a 'llava' model, not CLIP with its text tower",
        ("--method", "cdpruner", "--clip", str(clips(48))): "a vision tower of width 48, LLaVA's is 128",
        ("--method", "fastervlm", "--clip", str(clips(128))): "--clip has no effect with method fastervlm",
    }.items():
        check_refused(vtexport(*base, *more), message, tmp_path)


def test_a_question_longer_than_the_text_tower(clips) -> None:
    spec = read_clip(
        clips(48), read_spec(MICRO).vision.__class__(**{**vars(read_spec(MICRO).vision), "hidden_size": 48})
    )
    tokenizer = ClipTokenizer(clips(48), spec.length)
    assert len(tokenizer.ids("what digit is red?")) == spec.length
    with pytest.raises(InputError, match="but CLIP's text tower takes 24; shorten it"):
        tokenizer.ids("what " * 30)


def test_a_clip_without_tokenizer(clips, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((clips(48) / "config.json").read_text())
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        ClipTokenizer(tmp_path, 16)
