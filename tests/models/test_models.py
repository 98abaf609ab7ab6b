"""Checkpoints, good and hostile: geometry, weights and prompts."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import MICRO
from tests.conftest import noise_images
from vtexport.errors import InputError, ModelError
from vtexport.models import Checkpoint, Prompter, read_spec, recipe_names, resolve_model
from vtexport.models.pictures import open_image


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, copy)
    return copy


def edit_config(folder: Path, section: str | None = None, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_every_number_comes_from_the_config() -> None:
    spec = read_spec(MICRO)
    v, d = spec.vision, spec.decoder
    assert (v.image_size, v.patch_size, v.grid, v.num_patches, spec.num_visual_tokens) == (96, 8, 12, 144, 144)
    assert (v.num_layers, v.feature_layer, v.strategy) == (6, 5, "default")
    assert (d.num_layers, d.num_heads, d.num_kv_heads, d.head_size) == (12, 4, 2, 32)
    assert (spec.image_token_id, spec.eos_token_ids, d.tied_embeddings) == (4, (2,), False)


def test_the_7b_geometry_has_seven_billion_parameters(broken: Path) -> None:
    edit_config(
        broken, "vision_config", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, image_size=336, patch_size=14,
    )  # fmt: skip
    edit_config(
        broken, "text_config", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, vocab_size=32064,
    )  # fmt: skip
    spec = read_spec(broken)
    assert spec.num_visual_tokens == 576
    assert 7.04e9 < spec.num_parameters() < 7.07e9


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"model_type": "bert"}, "holds a 'bert' model, not LLaVA"),
        (None, {"model_type": None}, "without model_type"),
        (None, {"vision_feature_layer": [-2, -5]}, "only a single layer"),
        (None, {"vision_feature_layer": 0}, "outside the tower"),
        (None, {"vision_feature_layer": 9}, "outside the tower"),
        (None, {"vision_feature_select_strategy": "half"}, "half"),
        ("text_config", {"model_type": "gemma"}, "the language model is 'gemma'"),
        ("vision_config", {"model_type": "dinov2"}, "the vision tower is 'dinov2'"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "drops a patch of SigLIP"),
        ("vision_config", {"patch_size": 7}, "not a multiple of patch_size"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type 'dynamic'"),
    ],
)  # fmt: skip
def test_what_the_graphs_have_not_is_refused(broken: Path, section, changes, message: str) -> None:
    edit_config(broken, section, **changes)
    with pytest.raises(ModelError, match=message):
        read_spec(broken)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_broken_config_is_refused(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config.json"):
        read_spec(broken)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        read_spec(tmp_path)


def test_missing_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model.safetensors \(pickled weights .* are not read\)"):
        Checkpoint.open(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(broken: Path, keep: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        Checkpoint.open(broken)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 1},
        [1],
    ],
    ids=["past-the-end", "before-the-start", "size-not-of-shape", "no-offsets", "no-entry", "no-object"],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        Checkpoint.open(tmp_path)


def test_an_index_names_shards_of_its_own_folder_only(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"is missing although model.safetensors.index.json names it"):
        Checkpoint.open(broken)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="a file outside the folder"):
        Checkpoint.open(broken)


def test_sharded_weights_are_read(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = Checkpoint.open(broken)
    tensors = load_file(broken / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in halves.items():
        save_file({name: tensors[name] for name in members}, broken / shard)
    (broken / "model.safetensors").unlink()
    weight_map = {name: shard for shard, members in halves.items() for name in members}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(broken).tensors.keys() == whole.tensors.keys()


def test_weights_of_another_geometry_are_refused(broken: Path, tmp_path: Path) -> None:
    from vtexport.builder.build import build
    from vtexport.builder.options import BuildOptions

    edit_config(broken, "text_config", intermediate_size=128)
    with pytest.raises(ModelError, match=r"has shape \(96, 64\) but config.json asks for \(128, 64\)"):
        build(BuildOptions(str(broken), 0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_fp16_are_refused(broken: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from vtexport.builder.build import build
    from vtexport.builder.options import BuildOptions

    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ModelError, match="does not fit into fp16; build with --dtype fp32"):
        build(BuildOptions(str(broken), 0.5, dtype="fp16"), tmp_path / "out")


def test_models_are_resolved(tmp_path: Path) -> None:
    assert resolve_model("micro-llava") == MICRO
    assert resolve_model(str(tmp_path)) == tmp_path
    assert {"llava-1.5-13b", "llava-1.5-7b", "llava-1.6-mistral-7b", "micro-llava"} <= set(recipe_names())
    with pytest.raises(InputError, match=r"unknown model 'llava-2'; .* llava-1.5-13b, llava-1.5-7b, .*micro-llava"):
        resolve_model("llava-2")
    with pytest.raises(InputError, match="unknown model"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_args: object, **_kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"cannot download 'someone/something' \(no route to host\)"):
        resolve_model("someone/something")
    with pytest.raises(ModelError, match=r"llava-hf/llava-1.5-7b-hf"):
        resolve_model("llava-1.5-7b")


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(MICRO, read_spec(MICRO))


def test_the_image_stands_where_the_prompt_says(prompter: Prompter) -> None:
    first = prompter.prompt("what digit is red?")
    assert prompter.tokenizer.decode(first.token_ids) == "<s>USER: \nwhat digit is red? ASSISTANT:"
    inside = prompter.prompt("in this <image> what digit is red?")
    (at,) = inside.image_positions
    assert at > first.image_positions[0]
    before = prompter.tokenizer.decode(inside.token_ids[:at])
    assert before == "<s>USER: in this "
    assert inside.num_after == len(inside.token_ids) - at


def test_prompts_agree_with_transformers_processor(prompter: Prompter) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MICRO)
    image = noise_images(1)[0]
    content = [{"type": "image"}, {"type": "text", "text": "where is the 3?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="np")
    prompt = prompter.prompt("where is the 3?")
    ids, at = list(prompt.token_ids), prompt.image_positions[0]
    assert inputs["input_ids"][0].tolist() == ids[:at] + [4] * 144 + ids[at:]
    np.testing.assert_array_equal(inputs["pixel_values"], prompter.views(image).pixels)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("<image> and <image>", "has 2 <image> marks, this model was built for 1"),
        ("", "the prompt is empty"),
        ("  <image> ", "the prompt is empty"),
    ],
)
def test_prompts_without_exactly_one_image_or_words_are_refused(
    prompter: Prompter, question: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prompter.prompt(question)


def test_a_template_without_an_image_is_refused(broken: Path) -> None:
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(InputError, match="0 images; 1 were asked for"):
        Prompter(broken, read_spec(broken)).prompt("hello")


def test_processors_that_are_missing_or_of_another_size_are_refused(broken: Path) -> None:
    spec = read_spec(broken)
    larger = replace(spec, vision=replace(spec.vision, image_size=48))
    with pytest.raises(ModelError, match="the image processor yields 40 x 40 pixels"):
        Prompter(broken, larger).views(noise_images(1)[0])
    (broken / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="has no usable image processor"):
        Prompter(broken, spec)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        Prompter(broken, spec)


def test_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such image"):
        open_image(tmp_path / "nowhere.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(InputError, match="not a readable image"):
        open_image(text)
    grey = tmp_path / "grey.png"
    Image.new("LA", (5, 7)).save(grey)
    assert open_image(grey).mode == "RGB"
    cut = tmp_path / "cut.png"
    noise_images(1)[0].save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(InputError, match="not a readable image"):
        open_image(cut)


def test_what_is_shown_is_what_the_tower_sees(prompter: Prompter) -> None:
    image = noise_images(1, size=(96, 96))[0]
    np.testing.assert_allclose(
        np.asarray(prompter.shown(prompter.views(image).pixels[0]), int), np.asarray(image, int), atol=1
    )
