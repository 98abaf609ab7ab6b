"""The JSON files that transformers.js reads beside the graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtexport.bundle.folder import PROCESSOR_FOLDER, Bundle
from vtexport.errors import InputError
from vtexport.models.prompt import chat_template
from vtexport.models.spec import ModelSpec
from vtexport.models.trust import open_tokenizer
from vtexport.pruning import PruningPlan
from vtexport.reading import read_json

#: the version that the layout was tested with
VERSION = "4.3.1"
_COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def check_files(bundle: Bundle) -> None:
    """Refuse a bundle whose processor files transformers.js cannot read.

    Raises:
        InputError: there is no tokenizer.json, no image processor, or no chat template.
    """
    folder = bundle.folder / PROCESSOR_FOLDER
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json, which transformers.js reads; save the checkpoint's tokenizer with "
            "transformers, and build again"
        )
    if not _image_processor(folder):
        raise InputError(f"{folder} has no preprocessor_config.json; get that of the checkpoint, and build again")
    if not chat_template(folder):
        raise InputError(f"{folder} has no chat template; add chat_template.jinja to the checkpoint, and build again")


def write_files(bundle: Bundle, plan: PruningPlan, spec: ModelSpec, loading: Mapping[str, Any], out: Path) -> None:
    """Write configurations, tokenizer and processor into `out`.

    Args:
        bundle: the bundle.
        plan: its plan.
        spec: its model.
        loading: what transformers.js must know to load the graphs, its "transformers.js_config".
        out: where to.
    """
    folder = bundle.folder / PROCESSOR_FOLDER
    for name in _COPIED:
        if (folder / name).is_file():
            (out / name).write_bytes((folder / name).read_bytes())
    _write_configs(folder, spec, loading, out)
    _write_processor(folder, plan, spec, out)
    package = {"private": True, "type": "module", "dependencies": {"@huggingface/transformers": VERSION}}
    _write(out / "package.json", package)


def _write_configs(folder: Path, spec: ModelSpec, loading: Mapping[str, Any], out: Path) -> None:
    """The model's configuration, and that of its generation."""
    decoder, ends = spec.decoder, list(spec.eos_token_ids)
    # Checkpoints leave out what their model type has as a default, and transformers.js knows no defaults.
    text = {
        "model_type": "llama",
        **spec.config.get("text_config", {}),
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_size,
        "vocab_size": decoder.vocab_size,
    }
    config = {
        **spec.config,
        "text_config": text,
        "image_token_index": spec.image_token_id,
        "eos_token_id": ends,
        "transformers.js_config": dict(loading),
    }
    _write(out / "config.json", config)
    _write(out / "generation_config.json", {**_read(folder / "generation_config.json"), "eos_token_id": ends})


def _write_processor(folder: Path, plan: PruningPlan, spec: ModelSpec, out: Path) -> None:
    """The configurations of tokenizer, image processor, and the processor that has both."""
    template = {"chat_template": chat_template(folder)}
    _write(out / "tokenizer_config.json", {**_read(folder / "tokenizer_config.json"), **template})
    _write(out / "preprocessor_config.json", {**_image_processor(folder), "processor_class": "LlavaProcessor"})
    own = _read(folder / "processor_config.json")
    processor = {
        **{name: value for name, value in own.items() if name != "image_processor"},
        "processor_class": "LlavaProcessor",
        "image_token": _image_token(folder, spec.image_token_id),
        "patch_size": spec.vision.patch_size,
        # It repeats the image token as often as there are patches, and this often more: fewer times, where tokens left.
        "num_additional_image_tokens": plan.vision_tokens - spec.vision.num_patches,
    }
    _write(out / "processor_config.json", processor)


def _image_processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings, in a file of their own or, since transformers 5, among the processor's."""
    nested: dict[str, Any] = _read(folder / "processor_config.json").get("image_processor", {})
    return _read(folder / "preprocessor_config.json") or nested


def _image_token(folder: Path, token_id: int) -> str:
    """The text of the image token."""
    return str(open_tokenizer(folder).convert_ids_to_tokens(token_id))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, kind=dict[str, Any]) if path.is_file() else {}
    return found


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
