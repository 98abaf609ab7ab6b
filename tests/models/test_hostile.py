"""Checkpoints that were made to harm: code, numbers without bounds, headers that lie, templates that never end."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.checkpoints import FAMILIES, MICRO, family_checkpoint
from vtexport.builder.build import build, dry_run
from vtexport.builder.options import BuildOptions
from vtexport.errors import InputError, ModelError
from vtexport.graph.export import trace_language, trace_vision
from vtexport.models import Checkpoint, Prompter, read_spec, resolve_model
from vtexport.models.names import PREFIXES
from vtexport.models.needed import check_weights, needed
from vtexport.models.sandbox import TooMuch
from vtexport.models.spec import ViewChoice
from vtexport.models.template import ChatTemplate
from vtexport.pruning import Geometry, dense_plan, make_plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of micro-llava that a test may break."""
    shutil.copytree(MICRO, tmp_path / "model", ignore=shutil.ignore_patterns("*.png", "*.py", "*.md"))
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    """Change settings of a JSON file; `text_config__x` is x of text_config."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    path.write_text(json.dumps(settings))


def edit_processor(folder: Path, **changes: Any) -> None:
    """Change settings of a checkpoint's image processor."""
    edit(folder / "processor_config.json", **{f"image_processor__{name}": value for name, value in changes.items()})


# Tokens and sizes


TOKEN = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
STRANGE = {"content": None, "\x1b]0;x\x07": 1}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("special_tokens_map.json", {"anything": STRANGE}),
        ("special_tokens_map.json", {"extra_special_tokens": [STRANGE]}),
        ("special_tokens_map.json", {"bos_token": {**TOKEN, "__type": "AddedToken"}}),
        ("tokenizer_config.json", {"bos_token": STRANGE}),
        ("tokenizer_config.json", {"anything": {**STRANGE, "__type": "AddedToken"}}),
        ("tokenizer_config.json", {"additional_special_tokens": [STRANGE]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"anything": STRANGE}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {**TOKEN, "id": 1}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 1, "special": True, **TOKEN, "__type": "AddedToken"}]}),
    ],
)
def test_tokens_whose_properties_would_be_printed_are_refused(
    model: Path, name: str, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model / name, **settings)
    with pytest.raises(ModelError, match=rf"{name}: '.*' is no property of a token"):
        Prompter(model, read_spec(model))
    assert capfd.readouterr().out == ""


def test_tokens_as_checkpoints_have_them_are_taken(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(model / "special_tokens_map.json", bos_token=TOKEN, unk_token="<unk>")
    edit(model / "tokenizer_config.json", bos_token={**TOKEN, "__type": "AddedToken"})
    edit(model / "tokenizer_config.json", added_tokens_decoder={"1": {**TOKEN, "special": True}})
    Prompter(model, read_spec(model)).prompt("what is it?")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("special_tokens", [{}, {"<S>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}])
@pytest.mark.parametrize("nested", [False, True])
def test_tokens_around_a_prompt_are_defined(
    model: Path, special_tokens: dict[str, Any], nested: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers library would end in a panic, and print it."""
    template = json.loads((model / "tokenizer.json").read_text())["post_processor"]
    broken = {**template, "special_tokens": special_tokens}
    edit(
        model / "tokenizer.json",
        post_processor={"type": "Sequence", "processors": [template, broken]} if nested else broken,
    )
    with pytest.raises(ModelError, match=r"puts '<s>' around prompts and does not define it; get it again"):
        Prompter(model, read_spec(model))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer_truncation", "tokenizer_padding", "_json_truncation", "_json_padding"])
def test_internal_settings_of_tokenizers_are_refused(model: Path, name: str) -> None:
    edit(model / "tokenizer_config.json", **{name: {"max_length": 512, "stride": 0, "\x1b]0;x\x07": 1}})
    with pytest.raises(ModelError, match=f"{name} sets what belongs into tokenizer.json"):
        Prompter(model, read_spec(model))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"crop_size": {"height": 96, "width": 96_000}},
            "crop_size has 'width' 96000, which must be a whole number from 1",
        ),
        ({"size": {"shortest_edge": -1}}, "size has 'shortest_edge' -1"),
        *(
            ({"image_grid_pinpoints": value}, "has other resolutions than config.json lists")
            for value in (5, [5], [None], [[96, 96]])
        ),
        ({"image_processor_type": "DPTImageProcessor", "size_divisor": 2000}, "which no LLaVA model has"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.05}, "which no LLaVA model has"),
    ],
)
def test_image_processors_that_scale_without_bound_are_refused(
    model: Path, settings: dict[str, Any], found: str
) -> None:
    edit_processor(model, **settings)
    with pytest.raises(ModelError, match=found):
        Prompter(model, read_spec(model))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"crop_size": {"height": 4, "width": 4}}, "must be a whole number from 40 to 40"),
        ({"size": {"shortest_edge": 20}}, "must be a whole number from 40 to 40"),
        ({"image_grid_pinpoints": [[200, 200]]}, "has other resolutions than config.json lists"),
        ({"image_grid_pinpoints": [[40, 80]] * 600}, "has other resolutions than config.json lists"),
    ],
)
def test_tiles_are_those_of_the_model(tmp_path: Path, settings: dict[str, Any], found: str) -> None:
    folder = family_checkpoint(tmp_path / "model", "llava_next-vicuna")
    spec = read_spec(folder, ViewChoice(grid="2x2"))
    assert spec.vision.image_size == 40
    Prompter(folder, spec)
    edit_processor(folder, **settings)
    with pytest.raises(ModelError, match=found):
        Prompter(folder, spec)


def test_a_long_image_is_not_padded_to_a_huge_square(model: Path) -> None:
    """115,000 x 575 pixels would be 40 GB."""
    edit_processor(model, image_processor_type="LlavaImageProcessor", do_pad=True)
    views = Prompter(model, read_spec(model)).views(Image.new("RGB", (115_000, 575), "red"))
    assert views.pixels.shape == (1, 3, 96, 96)


# Code


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_code_of_a_checkpoint_never_runs(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(model / name, auto_map={"AutoTokenizer": ["evil.Evil", None], "AutoImageProcessor": "evil.Evil"})
    ran = model.parent / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ModelError, match=r"auto_map names Python code of its own, which is never run; get"):
        Prompter(model, read_spec(model))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"_attn_implementation": "someone/kernel"}, "names a kernel to download"),
        ("config.json", {"text_config__attn_implementation": "a/b"}, "names a kernel to download"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "does not read"),
        ("config.json", {"transformers_weights": "../x.safetensors"}, "names other weights"),
        ("config.json", {"to_dict": 1}, "'to_dict' is not a setting"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "names other tokenizers"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "holds an adapter"),
    ],
)
def test_nothing_leads_out_of_the_folder(model: Path, name: str, changes: dict[str, Any], message: str) -> None:
    edit(model / name, **changes)
    with pytest.raises(ModelError, match=message):
        Prompter(model, read_spec(model))


def test_pipes_and_giants_are_not_read(model: Path) -> None:
    spec = read_spec(model)
    (model / "tokenizer.model").touch()
    os.truncate(model / "tokenizer.model", 1 << 40)
    with pytest.raises(ModelError, match=r"more than the 268435456 of any real one"):
        Prompter(model, spec)
    (model / "tokenizer.model").unlink()
    os.mkfifo(model / "special_tokens_map.json")
    with pytest.raises(ModelError, match="not a regular file"):
        Prompter(model, spec)


# Numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("text_config__num_hidden_layers", value) for value in (100_000, 0, -1, True, 2.5, "3", [3], 10**30)),
        ("text_config__hidden_size", 1 << 20),
        ("text_config__vocab_size", 1 << 30),
        ("text_config__max_position_embeddings", 1 << 40),
        ("text_config__rms_norm_eps", -1.0),
        ("text_config__num_attention_heads", 3),
        ("text_config__num_key_value_heads", 3),
        ("text_config__head_dim", 33),
        ("text_config__hidden_act", "mish"),
        ("text_config__hidden_act", []),
        ("text_config__rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("text_config__rope_parameters", {"rope_type": [], "rope_theta": 1e4}),
        ("text_config", []),
        ("vision_config__image_size", 960_000),
        ("vision_config__patch_size", 0),
        ("vision_config__patch_size", 128),
        ("vision_config__num_attention_heads", 7),
        ("vision_config__hidden_act", None),
        ("image_token_index", 384),
        ("vision_feature_layer", True),
        ("vision_feature_layer", 10**40),
        ("model_type", ["llava"]),
    ],
)
def test_numbers_have_bounds(model: Path, name: str, value: Any) -> None:
    edit(model / "config.json", **{name: value})
    with pytest.raises(ModelError, match=r"^[^\n]*; [^\n]*$"):
        read_spec(model)


@pytest.mark.parametrize("ids", [[[]], "2", 2.0, True, 384, -1, [2, None], list(range(2, 102)), {"a": 1}])
def test_end_tokens_are_tokens(model: Path, ids: Any) -> None:
    edit(model / "generation_config.json", eos_token_id=ids)
    with pytest.raises(ModelError, match="eos_token_id"):
        read_spec(model)


@pytest.mark.parametrize("points", [[], [[40, 80]] * 1000, [[40]], [[0, 40]], [["a", "b"]], [[10**9, 40]], 7])
def test_resolutions_have_bounds(tmp_path: Path, points: Any) -> None:
    folder = family_checkpoint(tmp_path, "llava_next-vicuna")
    edit(folder / "config.json", image_grid_pinpoints=points)
    with pytest.raises(ModelError, match=r"^[^\n]*; [^\n]*$"):
        read_spec(folder, ViewChoice(grid="1x2"))


def test_a_prompt_has_as_many_visual_tokens_as_the_decoder_has_positions() -> None:
    def tried(images: int, **more: Any) -> None:
        dry_run(BuildOptions("micro-llava", views=ViewChoice(images=images), **more))

    with pytest.raises(InputError, match="give fewer --images or a --method that prunes before the decoder"):
        tried(20, keep=0.25)
    with pytest.raises(InputError, match=r"9216 visual tokens enter .* give fewer --images or a smaller --keep$"):
        tried(256, keep=0.25, method="fastervlm")
    with pytest.raises(InputError, match="at most 256"):
        tried(257)
    tried(20, keep=0.25, method="fastervlm")


# Weights


@pytest.mark.parametrize("case", FAMILIES)
def test_needed_weights_are_those_that_the_graphs_have(tmp_path: Path, case: str) -> None:
    folder = family_checkpoint(tmp_path, case)
    spec = read_spec(folder, ViewChoice(grid="2x2") if case.startswith("llava_") else None)
    plan = dense_plan(make_plan("random", Geometry.of(spec), keep=0.5))
    traced = {}
    for graph in (trace_vision(spec, [plan], "fp32", False), trace_language(spec, [plan], "fp32", room=None)):
        for name, value in graph.model.graph.initializers.items():
            if name.startswith(tuple(PREFIXES)):
                traced[name] = tuple(value.const_value.shape.numpy())
    assert needed(spec) == traced
    check_weights(Checkpoint.open(folder), spec)


def rewritten(path: Path, change: Any, data: bytes | None = None) -> None:
    """Change the header of a safetensors file, given and returned as JSON text."""
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    text = change(whole[8:end].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (whole[end:] if data is None else data))


def test_weights_are_checked_by_their_headers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtexport.builder.build.assemble", lambda *_, **__: pytest.fail("nothing is traced"))
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for change, message in (
        (lambda text: text.replace("layers.3.mlp.up_proj", "layers.3.mlp.other"), "has no tensor .*up_proj"),
        (lambda text: text.replace('"F16"', '"I16"'), "has dtype I16; vtexport reads weights in"),
        (lambda text: text.replace("[384,128]", "[128,384]"), "has shape .* but config.json asks for"),
    ):
        path.write_bytes(whole)
        rewritten(path, change)
        with pytest.raises(ModelError, match=message):
            build(BuildOptions(str(model), 0.5), tmp_path / "out")
    path.write_bytes(whole)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        build(BuildOptions(str(model), 0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


_A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        f"{{{_A},{_A}}}",
        f'{{{_A},"b":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}',
        f'{{{_A},"b":{{"dtype":"F32","shape":[1],"data_offsets":[6,10]}}}}',
        '{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}',
        "[" * 100_000,
        f"{{{_A}}}" + " " * 8,
    ],
    ids=["twice", "overlap", "hole", "dtype", "bool", "overflow", "deep", "rest"],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        Checkpoint.open(tmp_path)


def test_huge_headers_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30))
    os.truncate(path, 1 << 31)
    with pytest.raises(ModelError, match=r"its header would have 1073741824"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [{"a": 1}, {"a": ["x"]}, [], {}, {"a": ".."}, {"a": "/etc/passwd"}, {"a": "x.bin"}, {"a": "a\x00"}]
)
def test_indexes_that_lie_are_refused(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


def test_shards_may_be_links_but_no_pipes(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "shard.safetensors").symlink_to("../blob")
    assert len(Checkpoint.open(model).tensors) > 100
    (model / "shard.safetensors").unlink()
    os.mkfifo(model / "shard.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        Checkpoint.open(model)


# Tokenizers and templates


def test_tokens_are_the_models(model: Path) -> None:
    spec = read_spec(model)
    small = replace(spec, decoder=replace(spec.decoder, vocab_size=10))
    with pytest.raises(ModelError, match=r"the tokenizer gives token \d+, and the model has 10"):
        Prompter(model, small).prompt("what is it?")
    with pytest.raises(InputError, match="half of a character in it"):
        Prompter(model, spec).prompt("what \ud800?")


def test_tokenizers_that_explode_are_refused(model: Path) -> None:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
    edit(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [one] * 9})
    with pytest.raises(ModelError, match="makes texts more than 64 times as long"):
        Prompter(model, read_spec(model))


_DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 9 ** 9999999 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        *(
            _DOUBLING.replace("START", start).replace("NEXT", following)
            for start, following in (
                ("'a'", "ns.x ~ ns.x"),
                ("'a'", "ns.x + ns.x"),
                ("[1]", "[ns.x, ns.x]"),
                ("'a'", "ns.x.replace('a', 'aa')"),
                ("'a'", "'{0}{0}'.format(ns.x)"),
                ("'a'", "'%(a)s%(a)s' % {'a': ns.x}"),
                ("namespace(a=1)", "namespace(a=ns.x, b=ns.x)"),
                ("3", "ns.x * ns.x"),
            )
        ),
    ],
)
def test_templates_end(source: str) -> None:
    with pytest.raises(TooMuch):
        ChatTemplate(source).render(messages=[])


@pytest.mark.parametrize(
    "source", ["{{", "(" * 99_999 + "{{" + "(" * 9_999, "{% for %}", "{{ x | nothing }}", "a" * (1 << 19)]
)
def test_templates_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(ModelError, match="not one that Jinja reads"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}{{ loop.index }}{% if loop.last %}L{{ loop.length }}{% endif %}{{ m.role }}{% endfor %}",
        "{% macro r(c, n=2) -%}{% for i in range(n) %}{{ c ~ i ~ none }}{% endfor %}{%- endmacro %}{{ r('x') }}{{ r('y', 3) | trim }}",
        "{{ messages | tojson(indent=2) }}{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ {'a': [1, (2, 3)]} | tojson }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
        "{{ '%s-%s' % ('a', 3) }}{{ '{}:{x}'.format(1, x=2) }}{{ 'a' * 3 }}{{ [1] + [3] }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ 'a' < 'b' < 'c' }}",
        "{% generation %}{{ messages[0].role }}{% set q = 1 %}{% endgeneration %}{{ q is defined }}",
        "{% set x %}a{{ messages | length }}{% endset %}{{ x }}{% filter upper %}abc{% endfilter %}{{ nope }}{{ 'role' in messages[0] }}",
        "{% for m in messages recursive %}{{ m.role if m is mapping else m }}{% if m is mapping and m.content is not string %}"
        "{{ loop(m.content | map(attribute='type')) }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% if loop.index > 1 %}{% break %}{% endif %}{% else %}none{% endfor %}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ messages | groupby('role') | map('first') | list }}",
    ],
)
def test_templates_are_rendered_as_transformers_does(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    parts = [{"type": "image"}, {"type": "text", "text": ' hello "you" <b> '}]
    for messages in (
        [{"role": "system", "content": [parts[1]]}, {"role": "user", "content": parts}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yö"}, {"role": "user", "content": "so"}],
    ):
        theirs, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token="<s>")
        ours = ChatTemplate(source).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, bos_token="<s>"
        )
        assert ours == theirs[0]


def test_templates_in_a_list_are_read(model: Path) -> None:
    source = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": source}, {"name": "tools", "template": "{{ 1 }}"}]
    edit(model / "tokenizer_config.json", chat_template=named)
    assert Prompter(model, read_spec(model)).prompt("what is it?").text.startswith("USER: ")


# Names


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a\x00b", "~nobody-of-that-name/x", "a/b\nc", "a/" + "b" * 300, "", "a/..\n"]
)
def test_names_that_name_nothing(name: str) -> None:
    with pytest.raises(InputError, match=r"^unknown model [^\n]*$"):
        resolve_model(name)
