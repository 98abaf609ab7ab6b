"""What TensorRT-LLM is given: prompts that a faithful stand-in takes, and the layout of its engine flow."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.checkpoints import MICRO, family_checkpoint
from tests.conftest import BuildBundle, check_refused, noise_images
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError, VerificationError
from vtexport.measure.profile import Settings, profile
from vtexport.models import Prompter, read_spec
from vtexport.models.spec import ViewChoice
from vtexport.runtime.inputs import look, prefill_input
from vtexport.runtime.runner import Runner
from vtexport.targets.onnxruntime.session import OrtEngine
from vtexport.targets.tensorrt_llm import messages, prompts, reached
from vtexport.targets.tensorrt_llm.layout import build_flags, renamed

QUESTIONS = ("what digit is red?", "where is the 3?")


def attached(model: Any, tokenizer: Any, given: dict[str, Any]) -> torch.Tensor:
    """The language model's input [1, S, C] by what TensorRT-LLM documents: an image mark becomes the rows of its tensor.

    Its input processor tokenizes `prompt` itself and takes as many 2-D tensors of the model's width as there are marks.
    """
    assert set(given) == {"prompt", "multi_modal_embeddings"}
    assert set(given["multi_modal_embeddings"]) == {"image"}
    tensors = given["multi_modal_embeddings"]["image"]
    ids = tokenizer(given["prompt"])["input_ids"]
    mark = model.config.image_token_id
    assert isinstance(tensors, list)
    assert ids.count(mark) == len(tensors)
    embed, rows, left = model.get_input_embeddings(), [], iter(tensors)
    for token in ids:
        if token != mark:
            rows.append(embed(torch.tensor([token])))
            continue
        tensor = next(left)
        assert tensor.ndim == 2
        assert tensor.shape[1] == model.config.text_config.hidden_size
        rows.append(tensor)
    return torch.cat(rows)[None]


@pytest.mark.parametrize(
    ("case", "method", "asked"),
    [
        ("micro", "fastervlm", ViewChoice()),
        ("llava_next-vicuna", "fastervlm", ViewChoice(grid="2x2")),
        ("llava_next-mistral", "visionzip", ViewChoice(grid="2x1", images=2, arrangement="views")),
    ],
)
def test_a_language_model_answers_from_prompts_as_the_bundle_does(
    case: str, method: str, asked: ViewChoice, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    folder = MICRO if case == "micro" else family_checkpoint(tmp_path, case)
    runner = Runner.open(build_bundle(folder, 0.5, method, views=asked, self_check=False))
    size = (80, 160) if asked.grid == "2x1" else (150, 120)
    images = noise_images(2 * (asked.images or 1), size, seed=4)
    grouped = images if asked.images is None else [images[:2], images[2:]]
    pairs = list(zip(grouped, QUESTIONS, strict=True))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers = runner.ask(pairs, 12)
    for given, answer in zip(prompts(runner, pairs), answers, strict=True):
        with torch.inference_mode():
            hidden = attached(model, runner.prompter.tokenizer, given)
            count = len(answer.token_ids)
            out = model.generate(
                inputs_embeds=hidden,
                attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
            )
        assert out[0].tolist() == answer.token_ids
    (stage,) = answers[0].stages
    assert sum(len(tensor) for tensor in prompts(runner, pairs)[0]["multi_modal_embeddings"]["image"]) == len(
        stage.grid
    )


def test_messages_carry_the_same_tensors_for_the_server(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    pairs = list(zip(noise_images(2), QUESTIONS, strict=True))
    given = prompts(runner, pairs, torch.float16)
    for conversation, prompt, question in zip(messages(runner, pairs, torch.float16), given, QUESTIONS, strict=True):
        ((image, text),) = [message["content"] for message in conversation]
        assert text == {"type": "text", "text": question}
        assert image["type"] == "image_embeds"
        # As its server reads it.
        tensor = torch.load(io.BytesIO(base64.b64decode(image["image_embeds"]["data"])), weights_only=True)
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, prompt["multi_modal_embeddings"]["image"][0])
    json.dumps(conversation)


@pytest.mark.parametrize(
    ("question", "sent"),
    [("<image>\nwhat digit is red?", "what digit is red?"), ("  <image> what?", "what?"), (" what? ", " what? ")],
)
def test_messages_leave_marks_to_the_server(question: str, sent: str, build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    (conversation,) = messages(runner, [(noise_images(1)[0], question)])
    assert conversation[0]["content"][-1] == {"type": "text", "text": sent}
    assert [part["type"] for part in conversation[0]["content"]] == ["image_embeds", "text"]


def test_messages_refuse_a_mark_behind_text(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    with pytest.raises(InputError, match=r"has a <image> mark behind text; put the marks first"):
        messages(runner, [(noise_images(1)[0], "what digit is red in <image>?")])


@pytest.mark.parametrize(
    ("method", "views", "keep"),
    [
        ("sparsevlm", ViewChoice(grid="2x2"), 0.4),
        ("fastervlm+fastv", ViewChoice(grid="2x1", images=2, arrangement="views"), 0.3),
    ],
)
def test_first_layers_choose_tokens_for_a_model_elsewhere(
    method: str, views: ViewChoice, keep: float, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    """The build has compared the choice with the reference; here, embeddings go out as they came from the vision stage."""
    folder = family_checkpoint(tmp_path, "llava_next-vicuna")
    bundle = build_bundle(folder, keep, method, views=views, target="tensorrt-llm", target_options={"flow": "select"})
    runner = Runner.open(bundle)
    assert runner.bundle.manifest.verification is not None
    assert runner.bundle.manifest.verification.same_kept
    (stage,) = runner.plan.decoder_stages.values()
    size = (80, 160) if views.grid == "2x1" else (150, 120)
    images = noise_images(2 * (views.images or 1), size, seed=4)
    grouped = images if views.images is None else [images[:2], images[2:]]
    pairs = list(zip(grouped, QUESTIONS, strict=True))
    requests = [runner.request(*pair) for pair in pairs]
    vision = look(runner.engine, runner.plan, requests)
    kept = runner.engine.select(prefill_input(runner.plan, requests, vision)).kept
    for row, (given, (_, question)) in enumerate(zip(prompts(runner, pairs), pairs, strict=True)):
        tensors = given["multi_modal_embeddings"]["image"]
        assert len(tensors) == (views.images or 1)
        sent = torch.cat(tensors).numpy()
        assert len(sent) == stage.kept
        assert kept[row].tolist() == sorted(set(kept[row].tolist()))
        np.testing.assert_array_equal(sent, vision.seen().visual[row][kept[row]])
        text = len(runner.prompter.prompt(question).token_ids)
        assert reached(runner, question, text + stage.kept) == stage.kept
    with pytest.raises(InputError, match="holds a vision engine alone, for tensorrt-llm"):
        runner.ask(pairs)


def test_a_dense_run_elsewhere_shows(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.5, "fastervlm", self_check=False))
    text = len(runner.prompter.prompt(QUESTIONS[0]).token_ids)
    assert reached(runner, QUESTIONS[0], text + 72) == 72
    for tokens in (144, 71, 0, -3):
        with pytest.raises(
            VerificationError, match=f"^{tokens} visual tokens reached the decoder, the bundle's plan has 72;"
        ):
            reached(runner, QUESTIONS[0], text + tokens)


def test_pruning_inside_the_decoder_has_no_embeddings(build_bundle: BuildBundle) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.4, "sparsevlm", self_check=False))
    with pytest.raises(InputError, match=r"prunes inside the decoder.*build with a vision-stage method"):
        prompts(runner, [(noise_images(1)[0], QUESTIONS[0])])


@pytest.mark.skipif(find_spec("tensorrt_llm") is None, reason="tensorrt_llm is not installed")
def test_tensorrt_llms_own_input_processor_takes_them(build_bundle: BuildBundle, tmp_path: Path) -> None:
    from tensorrt_llm import SamplingParams
    from tensorrt_llm._torch.models.modeling_llava_next import LlavaNextInputProcessor
    from transformers import AutoConfig

    folder = family_checkpoint(tmp_path, "llava_next-vicuna")
    runner = Runner.open(build_bundle(folder, 0.5, "fastervlm", views=ViewChoice(grid="2x2"), self_check=False))
    (given,) = prompts(runner, [(noise_images(1, (150, 120))[0], QUESTIONS[0])])
    processor = LlavaNextInputProcessor(
        str(folder), AutoConfig.from_pretrained(folder), runner.prompter.tokenizer, trust_remote_code=False
    )
    ids, extra = processor.attach_multimodal_embeddings(given, given["multi_modal_embeddings"], SamplingParams())
    (tensor,) = given["multi_modal_embeddings"]["image"]
    assert len(ids) == len(runner.prompter.prompt(QUESTIONS[0]).token_ids) + len(tensor)
    assert extra["multimodal_data"]["multimodal_embedding"].shape == tensor.shape


# --- the target ---------------------------------------------------------------------------------------------------


def made(**target: str | int) -> BuildOptions:
    options = {"vision_runtime": "tensorrt", "plugins": 0, "max_batch": 2, "max_text": 128, **target}
    return BuildOptions(str(MICRO), 0.25, "fastervlm", "tensorrt-llm", "fp32", target_options=options)


@pytest.mark.usefixtures("stand_in")
def test_a_bundle_holds_the_vision_engine_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_a_gpu_to_run_on(monkeypatch)
    bundle = build(made(), tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.target.graphs == {"vision": "engine/vision.plan"}
    assert list(manifest.graphs) == ["vision"]
    assert manifest.verification.same_kept
    assert manifest.verification.max_logit_error < 1e-4
    assert manifest.verification.tokens == 0
    engines = [entry.path for entry in manifest.files if entry.path.startswith("engine/")]
    assert engines == ["engine/vision.plan"]
    opened = Runner.open(bundle.folder)
    with pytest.raises(InputError, match="holds a vision engine alone, for tensorrt-llm"):
        opened.ask([(noise_images(1)[0], QUESTIONS[0])])
    with pytest.raises(InputError, match="holds a vision engine alone, for tensorrt-llm"):
        profile(bundle.folder, settings=Settings(runs=1, new_tokens=2))


def without_a_gpu_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build as on a GPU, but check the ONNX files, which is done where a target cannot run."""
    from vtexport.builder import selfcheck

    monkeypatch.setattr(
        selfcheck,
        "_verifiable",
        lambda _target, compiled, plans, folder: (
            OrtEngine(folder, {name: f"engine/{name}.onnx" for name in compiled.files}, plans),
            "the ONNX files",
        ),
    )


@pytest.mark.usefixtures("stand_in")
def test_the_engine_flows_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_a_gpu_to_run_on(monkeypatch)
    bundle = build(made(flow="engine"), tmp_path / "bundle")
    names = {entry.path for entry in bundle.manifest.files}
    assert {"vision/model.engine", "vision/config.json", "llm/build.sh"} <= names
    assert not (bundle.folder / "engine").exists()
    assert (bundle.folder / "vision/model.engine").stat().st_size > 100_000
    config = json.loads((bundle.folder / "vision/config.json").read_text())["builder_config"]
    assert config == {
        "model_type": "llava",
        "precision": "float32",
        "max_batch_size": 2,
        "output_shape": [-1, 36, 128],
    }
    script = bundle.folder / "llm/build.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert re.search(r"trtllm-build .*--max_multimodal_len 72\b", script.read_text().replace("\\\n", ""))


def test_the_script_passes_its_flags_on(tmp_path: Path) -> None:
    """Run with stand-ins for TensorRT-LLM's programs, which write down what they were told."""
    from vtexport.targets.tensorrt_llm import layout

    script = tmp_path / "build.sh"
    script.write_text(layout._SCRIPT.format(**build_flags(144, 4, 512, "float16")))
    for name in ("python3", "trtllm-build"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/called"\n')
        (tmp_path / name).chmod(0o755)
    # Neither the capitals nor what else the folder is called may matter.
    checkpoint = tmp_path / "LLaVA-not-vila"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b'{"language_model.model.layers.0.mlp.up_proj.weight": {}}')
    command = [shutil.which("bash") or "bash", script, checkpoint, "/src/TensorRT-LLM"]
    subprocess.run(command, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    convert, compile_ = (tmp_path / "called").read_text().splitlines()
    # What it is told of is gone by now.
    (told,) = re.findall(r"--model_dir (\S+)", convert)
    assert Path(told).name == "llava"
    assert "vila" not in told
    assert not Path(told).parent.exists()
    assert convert.startswith("python3 /src/TensorRT-LLM/examples/models/core/llama/convert_checkpoint.py")
    assert "--max_multimodal_len 576" in compile_
    assert "--max_batch_size 4" in compile_
    assert "--max_input_len 656" in compile_


def test_the_script_refuses_weights_that_tensorrt_llm_cannot_name(tmp_path: Path) -> None:
    from vtexport.targets.tensorrt_llm import layout

    script, checkpoint = tmp_path / "build.sh", tmp_path / "model"
    script.write_text(layout._SCRIPT.format(**build_flags(144, 4, 512, "float16")))
    checkpoint.mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (checkpoint / name).write_text('{"model.language_model.layers.0.mlp.up_proj.weight": {}}' + " " * 100_000)
        done = subprocess.run(["bash", script, checkpoint, "/src"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {checkpoint} was saved again by a newer transformers")
        assert len(done.stderr.splitlines()) == 1
        (checkpoint / name).unlink()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_renamed_graph_is_the_same_graph(dtype: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    import onnx_ir as ir

    bundle = build_bundle(MICRO, 0.25, "fastervlm", dtype=dtype, self_check=False)
    engines = tmp_path / "engine"
    shutil.copytree(bundle / "engine", engines)
    ir.save(renamed(ir.load(engines / "vision.onnx"), dtype), engines / "renamed.onnx")
    graph = onnx.load(engines / "renamed.onnx", load_external_data=False).graph
    assert [one.name for one in graph.input] == ["input"]
    assert [one.name for one in graph.output] == ["encoder_output", "kept"]
    kind = {"fp32": np.float32, "fp16": np.float16}[dtype]
    assert graph.input[0].type.tensor_type.elem_type == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    prompter = Prompter(MICRO, read_spec(MICRO))
    pixels = np.concatenate([prompter.views(image).pixels for image in noise_images(3)]).astype(kind)
    ours, theirs = (onnxruntime.InferenceSession(engines / f"{name}.onnx") for name in ("vision", "renamed"))
    expected = ours.run(["visual", "kept"], {"pixel_values": pixels.astype(np.float32)})
    for got, wanted in zip(theirs.run(["encoder_output", "kept"], {"input": pixels}), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("stand_in")
def test_what_has_no_place_there_is_refused(vtexport, tmp_path: Path) -> None:
    for flags, message in (
        (
            "--keep 0.4 --method sparsevlm --flow engine --no-plugins",
            "prunes inside the decoder, which --flow engine leaves to TensorRT-LLM; use --flow pytorch",
        ),
        (
            "--keep 0.4 --method fastervlm --flow torch",
            "--flow torch is unknown to target tensorrt-llm; choose one of pytorch, select, engine",
        ),
        (
            "--keep 0.4 --method fastervlm --flow engine --vision-runtime torch --no-plugins",
            "--plugins is an option of TensorRT",
        ),
        ("--keep 0.4 --method fastervlm --flow engine --vision-runtime torch", "leave --vision-runtime torch out"),
        ("--keep 0.4 --method fastervlm --max-batch 2", "or add --vision-runtime tensorrt"),
        ("--keep 0.4 --method fastervlm --flow engine --no-plugins --images 2", "use --flow pytorch for this build"),
        ("--keep auto --method fastervlm --flow engine --no-plugins", "use --flow pytorch for this build"),
        (
            "--keep 0.4 --method sparsevlm --flow select",
            "TensorRT-LLM has no llava model of its own to choose tokens for",
        ),
        ("--keep 0.4 --method fastervlm --flow select", "chooses no visual token in the decoder"),
        ("--keep auto --method sparsevlm --flow select", "which has one number of tokens; give a ratio"),
        (
            "--keep 0.4 --flow select --vision-runtime tensorrt",
            "runs through PyTorch; leave --vision-runtime tensorrt out",
        ),
        ("--keep 0.4 --method sgl", "by another bundle's ranking, which TensorRT-LLM has no way to pass on"),
        ("--keep auto --method sparsevlm", "chooses among prefill graphs, and TensorRT-LLM has one; give a ratio"),
    ):
        command = ("build", "--model", "micro-llava", "--target", "tensorrt-llm", *flags.split())
        check_refused(vtexport(*command, "--out", "b"), message, tmp_path)
    command = ("build", "--model", "micro-llava", "--target", "tensorrt-llm", "--method", "fastervlm", "--keep", "0.4")
    check_refused(vtexport(*command, "--flow", "engine", "--out", "b"), "add --no-plugins", tmp_path)
    strip = (*command, "--flow", "engine", "--no-plugins", "--strip-weights", "--out", "b")
    check_refused(vtexport(*strip), "leave --strip-weights out", tmp_path)
