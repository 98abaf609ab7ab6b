"""The LLaVA that a bundle registers with TensorRT-LLM, run by the stand-in: tokens, kept tokens, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import MICRO, family_checkpoint, random_checkpoint, random_clip
from tests.conftest import BuildBundle, greedy, noise_images
from tests.targets.tensorrt_llm_stand_in import SITE, installed
from tests.targets.tensorrt_llm_stand_in.server import Server
from vtexport.errors import InputError, TargetError, VerificationError
from vtexport.models.spec import ViewChoice
from vtexport.runtime.request import Request, Result
from vtexport.runtime.runner import Runner
from vtexport.targets.tensorrt_llm import prompts

QUESTIONS = ("what digit is red?", "where is the 3 and what colour does the background have?", "how many?")


@contextmanager
def registered(bundle: Path) -> Iterator[Any]:
    """TensorRT-LLM after it has imported the bundle's module, as `--custom_module_dirs` does."""
    with installed():
        sys.path.insert(0, str(bundle))
        try:
            yield import_module("vtexport_llava")
        finally:
            sys.path.remove(str(bundle))
            sys.modules.pop("vtexport_llava", None)


@pytest.fixture(scope="module")
def geometries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """micro-llava, and three random models: one key head, a key head per head, another depth."""
    folder = tmp_path_factory.mktemp("geometries")
    text = {"num_hidden_layers": 6, "max_position_embeddings": 512}
    return {
        "micro": MICRO,
        "grouped": random_checkpoint(folder / "grouped", 1, text={**text, "num_key_value_heads": 1}),
        "full": random_checkpoint(folder / "full", 2, text={**text, "num_key_value_heads": 4}),
        "deep": random_checkpoint(folder / "deep", 3, text={**text, "num_hidden_layers": 9}),
    }


CASES: dict[str, dict[str, Any]] = {
    "sparsevlm": {"layers": "1,3"},
    "fastv": {},
    "pyramiddrop": {},
    "fastervlm+sparsevlm": {"layers": "1,3", "vision_keep": 0.7},
}


class Both:
    """The same checkpoint and plan as our own bundle, and as one for TensorRT-LLM."""

    def __init__(self, build_bundle: BuildBundle, folder: Path, method: str, keep: float = 0.4, **more: Any) -> None:
        made = [build_bundle(folder, keep, method, self_check=False, target=name, **more) for name in TARGETS]
        self.folder, self.runner, self.bundle = folder, Runner.open(made[0]), made[1]

    def asked(self, images: Sequence[Any], questions: Sequence[str] = QUESTIONS) -> list[Request]:
        return [self.runner.request(image, question) for image, question in zip(images, questions, strict=True)]

    def answers(self, requests: list[Request], tokens: int) -> list[Result]:
        return greedy(self.runner, requests, tokens)


TARGETS = ("onnxruntime", "tensorrt-llm")


def sent(request: Request, image: Any) -> dict[str, Any]:
    """A request as TensorRT-LLM gets it."""
    if "<video>" in request.prompt.text:
        return {"prompt": request.prompt.text, "multi_modal_data": {"video": [image]}}
    images = image if isinstance(image, list) else [image]
    return {"prompt": request.prompt.text, "multi_modal_data": {"image": images}}


def listening(server: Server) -> dict[tuple[int, str], list[int]]:
    """The kept tokens of every request and stage that comes, as they come."""
    seen: dict[tuple[int, str], list[int]] = {}

    def note(layer: int, rows: Sequence[Any], dropped: Any) -> None:
        for row, index in zip(rows, dropped.index, strict=True):
            seen[row.request, f"decoder.{layer}"] = [number for number in index.tolist() if number >= 0]

    server.model.llm.model.on_stage = note
    return seen


def check(seen: dict[tuple[int, str], list[int]], number: int, output: list[int], result: Result) -> None:
    """A request kept the same tokens in the decoder, and was answered alike.

    Two ways to compute in fp32 may choose differently between two tokens whose logits differ by rounding alone; behind
    such a choice they answer other questions.
    """
    stages = {where: kept for where, kept in result.kept.items() if where != "vision"}
    assert stages
    for where, kept in stages.items():
        assert seen[number, where] == kept.tolist(), where
    assert len(output) == len(result.token_ids)
    differ = [step for step, pair in enumerate(zip(output, result.token_ids, strict=True)) if pair[0] != pair[1]]
    if differ:
        assert result.logits is not None
        logits = result.logits[differ[0]]
        assert logits.max() - logits[output[differ[0]]] < 1e-4 * abs(logits).max()


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "method"),
    [
        *(("micro", method) for method in CASES),
        ("grouped", "sparsevlm"),
        ("full", "pyramiddrop"),
        ("deep", "fastv"),
        *(
            pytest.param(geometry, method, marks=pytest.mark.long)
            for geometry in ("grouped", "full", "deep")
            for method in CASES
        ),
    ],
)
def test_the_staged_model_answers_as_our_own_graphs(
    geometry: str, method: str, geometries: dict[str, Path], build_bundle: BuildBundle
) -> None:
    """64 greedy tokens of a ragged batch."""
    both = Both(build_bundle, geometries[geometry], method, method_options=CASES[method])
    images = noise_images(3, seed=5)
    requests = both.asked(images)
    expected = both.answers(requests, 64)
    with registered(both.bundle):
        server = Server(both.folder)
        seen = listening(server)
        numbers = [server.submit(sent(*pair), 64) for pair in zip(requests, images, strict=True)]
        server.run()
        for number, result in zip(numbers, expected, strict=True):
            check(seen, number, server.output(number), result)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), [("sparsevlm", {"layers": "0,2"}), ("sparsevlm", {"positions": "original"}), ("fastv", {})]
)
def test_requests_that_come_and_go_do_not_touch_each_other(
    graphs: bool, method: str, options: dict[str, Any], geometries: dict[str, Path], build_bundle: BuildBundle
) -> None:
    """Contexts among generations, prompts without images, cancelled requests, numbers that come again, CUDA graphs."""
    both = Both(build_bundle, geometries["grouped"], method, method_options=options)
    images = noise_images(5, seed=8)
    requests = both.asked(images, [*QUESTIONS, *QUESTIONS[:2]])
    expected = both.answers(requests, 20)
    plain = {"prompt": "USER: how are you today? ASSISTANT:"}
    with registered(both.bundle):
        server = Server(both.folder, cuda_graphs=graphs)
        seen = listening(server)
        schedule = server.model.schedule
        alone = server.submit(plain, 12)
        server.run()
        said = server.output(alone)
        first = server.submit(sent(requests[0], images[0]), 20)
        server.step()
        words, second = server.submit(plain, 12), server.submit(sent(requests[1], images[1]), 20)
        server.step(2)
        assert len(schedule) == 2
        stopped = server.submit(sent(requests[2], images[2]), 20)
        server.step()
        server.step()
        server.cancel(stopped)
        assert len(schedule) == 2
        again = server.submit(sent(requests[3], images[3]), 20, request_id=stopped)
        last = server.submit(sent(requests[4], images[4]), 20)
        server.step(1)
        for _ in range(3):
            server.step()
        server.run()
        assert server.output(words) == said
        for number, row in ((first, 0), (second, 1), (again, 3), (last, 4)):
            check(seen, number, server.output(number), expected[row])
        assert len(schedule) == 0
        assert not graphs or server.runner.replays > 10


FAMILIES: dict[str, tuple[ViewChoice, str, dict[str, Any]]] = {
    "llava_next-vicuna": (
        ViewChoice(grid="2x1", images=2, arrangement="views"),
        "fastervlm+sparsevlm",
        {"layers": "1"},
    ),
    "llava_next-llama3": (ViewChoice(grid="2x2"), "fastv", {}),
    "llava_next-mistral": (ViewChoice(grid="2x1", arrangement="views"), "visionzip", {}),
    "video_llava": (ViewChoice(), "fastervlm+fastv", {}),
    "llava_onevision": (ViewChoice(grid="2x1"), "sparsevlm", {"layers": "0,2"}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_other_families_answer_as_our_own_graphs(case: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    """Qwen2 and Mistral, RoPE scaled as Llama 3's, several images, rows of different lengths, a vision stage alone."""
    choice, method, options = FAMILIES[case]
    folder = family_checkpoint(tmp_path / "model", case)
    both = Both(build_bundle, folder, method, 0.5, method_options=options, views=choice)
    size = (80, 160) if choice.grid == "2x1" else (150, 120)
    each = 8 if case == "video_llava" else choice.images or 1
    images = noise_images(2 * each, size, seed=4)
    shown = [images[:each], images[each:]] if each > 1 else images
    requests = both.asked(shown, QUESTIONS[:2])
    expected = both.answers(requests, 12)
    with registered(both.bundle):
        server = Server(folder)
        numbers = [server.submit(sent(*pair), 12) for pair in zip(requests, shown, strict=True)]
        server.run()
        assert [server.output(number) for number in numbers] == [result.token_ids for result in expected]


def test_embeddings_are_taken_as_images_are(build_bundle: BuildBundle) -> None:
    both = Both(build_bundle, MICRO, "fastervlm", 0.25)
    images = noise_images(2)
    expected = both.answers(both.asked(images, QUESTIONS[:2]), 8)
    given = prompts(Runner.open(both.bundle), list(zip(images, QUESTIONS[:2], strict=True)))
    with registered(both.bundle):
        server = Server(MICRO)
        numbers = [server.submit(prompt, 8) for prompt in given]
        server.run()
        assert [server.output(number) for number in numbers] == [result.token_ids for result in expected]
        few = torch.zeros(35, both.runner.spec.decoder.hidden_size)
        with pytest.raises(InputError, match="35 visual tokens came, the bundle's plan has 36"):
            server.submit({**given[0], "multi_modal_embeddings": {"image": [few]}}, 8)
        with pytest.raises(InputError, match=r"embeddings of shape \(36, 7\) came, the model takes \[tokens, 128\]"):
            server.submit({**given[0], "multi_modal_embeddings": {"image": [torch.zeros(36, 7)]}}, 8)
        with pytest.raises(InputError, match="2 embeddings came, the bundle was built for 1 per prompt"):
            server.submit({**given[0], "multi_modal_embeddings": {"image": [few, few]}}, 8)


def test_a_method_that_reads_the_question_is_served_with_embeddings(
    geometries: dict[str, Path], build_bundle: BuildBundle, tmp_path: Path
) -> None:
    """Its vision stage has weights that the LLaVA checkpoint has not, and is not made there."""
    clip = {"clip": str(random_clip(tmp_path / "clip", 5, 48))}
    both = Both(build_bundle, geometries["grouped"], "cdpruner", method_options=clip)
    (image,) = noise_images(1)
    pair = image, QUESTIONS[0]
    (given,), (expected,) = prompts(Runner.open(both.bundle), [pair]), both.runner.ask([pair], 8)
    with registered(both.bundle):
        server = Server(both.folder)
        number = server.submit(given, 8)
        server.run()
        assert expected.token_ids
        assert server.output(number)[: len(expected.token_ids)] == list(expected.token_ids)
        with pytest.raises(InputError, match="method cdpruner reads the question"):
            server.submit({"prompt": given["prompt"], "multi_modal_data": {"image": [image]}}, 8)


# --- what must not go unnoticed -------------------------------------------------------------------------------------


def test_parts_that_share_buffers_of_graphs_answer_wrongly(
    geometries: dict[str, Path], build_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap that `StagedMetadata` avoids: TensorRT-LLM hands out one buffer for every name."""
    both = Both(build_bundle, geometries["grouped"], "sparsevlm", method_options=CASES["sparsevlm"])
    (image,) = noise_images(1)
    (request,) = both.asked([image], QUESTIONS[:1])
    with registered(both.bundle):
        from vtexport.targets.tensorrt_llm.torch_model import metadata

        another = metadata.StagedMetadata._another

        def sharing(self: Any) -> Any:
            part = another(self)
            part.cuda_graph_buffers = self.cuda_graph_buffers
            part.__post_init__()
            return part

        answers = []
        for made in (another, sharing):
            monkeypatch.setattr(metadata.StagedMetadata, "_another", made)
            server = Server(both.folder, cuda_graphs=True)
            number = server.submit(sent(request, image), 12)
            server.run()
            answers.append(server.output(number))
    (expected,) = both.answers([request], 12)
    assert answers[0] == expected.token_ids != answers[1]


def test_what_reached_the_decoder_is_reported(
    build_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = Both(build_bundle, MICRO, "sparsevlm", method_options={"layers": "2,5"})
    (image,) = noise_images(1)
    (request,) = both.asked([image], QUESTIONS[:1])
    monkeypatch.setenv("VTEXPORT_REPORT", str(tmp_path / "report.jsonl"))
    with registered(both.bundle):
        server = Server(MICRO)
        number = server.submit(sent(request, image), 2)
        server.run()
        (line,) = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
        tokens = [both.runner.plan.per_layer[layer] for layer in (0, 3, 6)]
        assert line == {
            "request": number,
            "text": len(request.prompt.token_ids),
            "parts": [{"layer": x, "visual_tokens": y} for x, y in zip((0, 3, 6), tokens, strict=True)],
        }
        # A request that runs dense is an error, not an answer.
        monkeypatch.setattr(server.model.schedule, "start", lambda *_: None)
        server.submit(sent(request, image), 2)
        with pytest.raises(VerificationError, match=r"attention behind it expects \d+; please report this"):
            server.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"enable_block_reuse": True},
            r"^kv_cache_config\.enable_block_reuse cannot go with pruning inside the decoder",
        ),
        ({"enable_chunked_prefill": True}, "^enable_chunked_prefill cannot go with"),
        ({"max_beam_width": 2}, "^max_beam_width above 1 cannot go with"),
        ({"tensor_parallel": 2}, "^tensor_parallel_size 2 cannot go with"),
        ({"pipeline_parallel": 2}, "^pipeline_parallel_size 2 cannot go with"),
        ({"spec_config": object()}, "^speculative_config cannot go with"),
    ],
)
def test_features_that_cannot_go_with_it_are_refused_by_name(
    settings: dict[str, Any], message: str, geometries: dict[str, Path], build_bundle: BuildBundle
) -> None:
    folder = geometries["grouped"]
    bundle = build_bundle(
        folder, 0.4, "sparsevlm", target="tensorrt-llm", self_check=False, method_options=CASES["sparsevlm"]
    )
    with registered(bundle), pytest.raises(InputError, match=message):
        Server(folder, **settings)


def test_blocks_are_not_reused_where_the_vision_stage_alone_prunes(
    geometries: dict[str, Path], build_bundle: BuildBundle
) -> None:
    """Two images with the same question have equal token ids: the second would be answered by the first one's blocks."""
    folder = geometries["grouped"]
    bundle = build_bundle(folder, 0.25, "fastervlm", target="tensorrt-llm", self_check=False)
    with (
        registered(bundle),
        pytest.raises(InputError, match=r"^kv_cache_config\.enable_block_reuse cannot go with visual tokens"),
    ):
        Server(folder, enable_block_reuse=True)


def test_adapters_are_refused() -> None:
    from vtexport.targets.tensorrt_llm.torch_model.refusals import refuse_model

    with pytest.raises(InputError, match=r"^lora_config cannot go with pruning inside the decoder"):
        refuse_model(SimpleNamespace(mapping=SimpleNamespace(), lora_config=object()))


def test_compiled_layers_are_refused(geometries: dict[str, Path], build_bundle: BuildBundle) -> None:
    both = Both(build_bundle, geometries["grouped"], "sparsevlm", method_options=CASES["sparsevlm"])
    with registered(both.bundle), pytest.raises(InputError, match=r"^torch_compile_config cannot go with"):
        Server(both.folder, torch_compile=True)


def test_prompts_that_cannot_be_served_are_refused(geometries: dict[str, Path], build_bundle: BuildBundle) -> None:
    both = Both(build_bundle, geometries["grouped"], "sparsevlm", method_options=CASES["sparsevlm"])
    (image,) = noise_images(1)
    (request,) = both.asked([image], QUESTIONS[:1])
    text = request.prompt.text
    with registered(both.bundle):
        server = Server(both.folder)
        for prompt, message in (
            ({"prompt": text}, "has a <image> mark but no image came with it"),
            (
                {"prompt": text.replace("<image>", ""), "multi_modal_data": {"image": [image]}},
                "has 0 <image> marks for 1",
            ),
            (sent(request, [image, image]), "2 images were given, this model was built for 1 per prompt"),
        ):
            with pytest.raises(InputError, match=message):
                server.submit(prompt, 4)
        # As when TensorRT-LLM pauses a request: what was generated belongs to the prompt then.
        number = server.submit(sent(request, image), 8)
        server.step()
        server.step()
        server.preempt(number)
        with pytest.raises(InputError, match="leave capacity_scheduler_policy at GUARANTEED_NO_EVICT"):
            server.run()
        server = Server(both.folder, strip_after_prefill=True)
        number = server.submit(sent(request, image), 8)
        server.step()
        server.preempt(number)
        with pytest.raises(InputError, match="came without its images, as TensorRT-LLM loses them"):
            server.run()


def test_another_checkpoint_is_refused(geometries: dict[str, Path], build_bundle: BuildBundle) -> None:
    bundle = build_bundle(MICRO, 0.25, "fastervlm", target="tensorrt-llm", self_check=False)
    with (
        registered(bundle),
        pytest.raises(InputError, match="hidden_size is 64, the bundle was built for 128; serve the"),
    ):
        Server(geometries["grouped"])


def test_another_rope_is_refused(geometries: dict[str, Path], build_bundle: BuildBundle, tmp_path: Path) -> None:
    """As when transformers 4 reads a base that transformers 5 wrote under another name: answers would only get worse."""
    bundle = build_bundle(geometries["grouped"], 0.25, "fastervlm", target="tensorrt-llm", self_check=False)
    other = shutil.copytree(geometries["grouped"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 50000.0
    (other / "config.json").write_text(json.dumps(config))
    with (
        registered(bundle),
        pytest.raises(InputError, match="RoPE has base 50000, the bundle was built for 10000; serve"),
    ):
        Server(other)


#: what vtexport depends on and TensorRT-LLM 1.2 does not bring
ABSENT = ("cloup", "ml_dtypes", "onnx_ir", "onnxruntime", "onnxscript", "rich", "tomli_w")
IN_ITS_PYTHON = """
import sys
for name in {absent}:
    sys.modules[name] = None
sys.path[:0] = [{site!r}, {bundle!r}, {tests!r}]
import vtexport_llava
from tests.targets.tensorrt_llm_stand_in.server import Server
from PIL import Image
server = Server({folder!r})
image = Image.new("RGB", (80, 60), (200, 30, 30))
number = server.submit({{"prompt": "USER: <image> what? ASSISTANT:", "multi_modal_data": {{"image": [image]}}}}, 3)
server.run()
print(len(server.output(number)))
"""


def test_it_runs_with_what_tensorrt_llm_brings(build_bundle: BuildBundle) -> None:
    """And msgspec; vtexport is installed there without its dependencies."""
    bundle = build_bundle(MICRO, 0.44, "sparsevlm", target="tensorrt-llm", self_check=False)
    code = IN_ITS_PYTHON.format(
        absent=ABSENT, site=str(SITE), bundle=str(bundle), tests=str(Path(__file__).parents[2]), folder=str(MICRO)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "3\n", done.stderr


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: setattr(t, "__version__", "1.1.0"), "tensorrt_llm 1.1.0 is too old; install 1.2 or later"),
        (
            lambda t: delattr(t._torch.modules.attention.Attention, "apply_rope"),
            "Attention.apply_rope is missing; install",
        ),
        (
            lambda t: setattr(t._torch.modules.gated_mlp.GatedMLP, "__init__", lambda self, width: None),
            "GatedMLP takes no hidden_size, intermediate_size, bias, dtype, config; install 1.2.1, or report this version",
        ),
    ],
)
def test_another_tensorrt_llm_is_refused_before_anything_is_registered(
    break_it: Callable[[Any], None], message: str, build_bundle: BuildBundle
) -> None:
    bundle = build_bundle(MICRO, 0.44, "sparsevlm", target="tensorrt-llm", self_check=False)
    with installed() as tensorrt_llm:
        from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

        from vtexport.targets.tensorrt_llm.torch_model import register

        import_module("tensorrt_llm._torch.modules.gated_mlp")
        break_it(tensorrt_llm)
        with pytest.raises(TargetError, match=message):
            register(bundle, "vtexport_llava")
        assert "LlavaForConditionalGeneration" not in MODEL_CLASS_MAPPING


@pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="tensorrt_llm is installed")
def test_without_tensorrt_llm_the_module_says_so(build_bundle: BuildBundle) -> None:
    from vtexport.targets.tensorrt_llm.torch_model import register

    bundle = build_bundle(MICRO, 0.44, "sparsevlm", target="tensorrt-llm", self_check=False)
    with pytest.raises(
        TargetError, match=r"^tensorrt_llm is not installed; run this where TensorRT-LLM 1\.2 or later is"
    ):
        register(bundle, "vtexport_llava")


@pytest.mark.skipif(find_spec("tensorrt_llm") is None, reason="tensorrt_llm is not installed")
def test_the_installed_tensorrt_llm_has_what_is_used() -> None:
    from vtexport.targets.tensorrt_llm.torch_model.contract import differing

    assert list(differing()) == []


def test_worker_processes_find_the_model_by_its_name(build_bundle: BuildBundle) -> None:
    """TensorRT-LLM pickles its table of models for them."""
    bundle = build_bundle(MICRO, 0.44, "sparsevlm", target="tensorrt-llm", self_check=False)
    with registered(bundle) as module:
        from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata
        from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

        model = MODEL_CLASS_MAPPING["LlavaForConditionalGeneration"]
        assert model is module.VtexportLlava
        assert pickle.loads(pickle.dumps(model)) is model
        assert TrtllmAttention.Metadata is not TrtllmAttentionMetadata
    plain = build_bundle(MICRO, 0.25, "fastervlm", target="tensorrt-llm", self_check=False)
    with registered(plain):
        from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata

        # Nothing of the engine is replaced where only the vision stage prunes.
        assert TrtllmAttention.Metadata is TrtllmAttentionMetadata
