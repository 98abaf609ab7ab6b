"""config.json of every family: the geometry, the tables of RoPE and the weights that it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtexport.models.clip import read_clip
from vtexport.models.families import read_spec
from vtexport.models.needed import needed
from vtexport.models.rope import rope_frequencies
from vtexport.models.spec import ViewChoice

_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "head_dim": 16,
    "eos_token_id": 2, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 40,
    "patch_size": 8, "num_channels": 3, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
_FAMILIES = {
    "llava": ("clip_vision_model", "llama"),
    "llava_next": ("clip_vision_model", "mistral"),
    "llava_onevision": ("siglip_vision_model", "qwen2"),
    "video_llava": ("clip_vision_model", "llama"),
}


def seeds(place: Path) -> list[bytes]:
    """A config.json of each family, and one of CLIP."""
    found: list[dict[str, Any]] = []
    for family, (tower, decoder) in _FAMILIES.items():
        one: dict[str, Any] = {
            "model_type": family,
            "vision_config": {**_VISION, "model_type": tower},
            "text_config": {**_TEXT, "model_type": decoder},
            "image_token_index": 4,
            "vision_feature_layer": -2 if tower.startswith("clip") else -1,
            "vision_feature_select_strategy": "default" if tower.startswith("clip") else "full",
            "projector_hidden_act": "gelu",
        }
        if family.startswith("llava_"):
            one["image_grid_pinpoints"] = [[40, 80], [80, 80]]
        if family == "video_llava":
            one["video_token_index"] = 5
        found.append(one)
    found.append({"model_type": "clip", "text_config": {**_TEXT, "layer_norm_eps": 1e-5}, "vision_config": _VISION})
    return [json.dumps(one).encode() for one in found]


def one(data: bytes, place: Path) -> None:
    """Read the geometry; a choice of tiles, because some families want one."""
    path = place / "config.json"
    path.write_bytes(data)
    try:
        if b'"clip"' in data:
            spec = read_spec_of_clip(place)
        else:
            spec = read_spec(place, ViewChoice(grid="1x2") if b"pinpoints" in data else None)
        needed(spec)
        rope_frequencies(spec)
    finally:
        path.unlink()


def read_spec_of_clip(place: Path) -> Any:
    """A geometry whose CLIP is the one in `place`, beside a valid model."""
    from dataclasses import replace

    from tests.checkpoints import MICRO

    spec = read_spec(MICRO)
    tower = replace(spec.vision, hidden_size=_VISION["hidden_size"])
    return replace(spec, vision=tower, clip=read_clip(place, tower))
