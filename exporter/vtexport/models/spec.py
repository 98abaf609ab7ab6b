"""A model's geometry, read from config.json; nothing here knows a size by heart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtexport.errors import ModelError

#: bytes of a weight by an engine's dtype
ITEMSIZE = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class VisionSpec:
    """A CLIP vision tower and which of its states LLaVA reads.

    `feature_layer` counts states as transformers' `hidden_states` does, never negative: 0 is the embedding,
    i the output of layer i - 1. Layers after it never run.
    """

    image_size: int
    patch_size: int
    channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    layer_norm_eps: float
    feature_layer: int
    strategy: str

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches an image, the CLS token not counted."""
        return self.grid * self.grid

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens an image before pruning: the patches, and CLS first under strategy `full`."""
        return self.num_patches + (self.strategy == "full")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ClipSpec:
    """CLIP's text tower, and the width of the space that it shares with the vision tower.

    `length` is the tokens of a question, padding included; `eos_token_id` None means the greatest id ends it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    layer_norm_eps: float
    length: int
    projection: int
    eos_token_id: int | None

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class DecoderSpec:
    """A Llama decoder. `rope` is config.json's RoPE dictionary as transformers reads it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    activation: str
    rms_norm_eps: float
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """Everything vtexport needs to know of a LLaVA checkpoint besides its weights, and of a CLIP given with it."""

    family: str
    vision: VisionSpec
    decoder: DecoderSpec
    projector_bias: bool
    projector_activation: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    config: dict[str, Any]
    clip: ClipSpec | None = None

    def num_parameters(self) -> int:
        """Weights that the engines hold: the tower up to the feature layer, projector, decoder, CLIP's text tower."""
        v, d = self.vision, self.decoder
        tower = v.channels * v.patch_size**2 * v.hidden_size + (v.num_patches + 4) * v.hidden_size
        layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + 9 * v.hidden_size
        tower += v.feature_layer * (layer + v.intermediate_size)
        projector = v.hidden_size * d.hidden_size + d.hidden_size**2
        attention = d.hidden_size * d.head_size * 2 * (d.num_heads + d.num_kv_heads)
        block = attention + 3 * d.hidden_size * d.intermediate_size + 2 * d.hidden_size
        embeddings = d.vocab_size * d.hidden_size * (1 if d.tied_embeddings else 2)
        return tower + projector + d.num_layers * block + embeddings + d.hidden_size + self._clip_parameters()

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of those weights in an engine's dtype, "fp32" or "fp16"."""
        return self.num_parameters() * ITEMSIZE[dtype]

    def _clip_parameters(self) -> int:
        c = self.clip
        if c is None:
            return 0
        layer = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size + 9 * c.hidden_size + c.intermediate_size
        projections = (c.hidden_size + self.vision.hidden_size) * (c.projection + 2)
        return (c.vocab_size + c.length) * c.hidden_size + c.num_layers * layer + projections


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); download the checkpoint again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object; download the checkpoint again")
    return config


def read_spec(folder: Path) -> ModelSpec:
    """The geometry of the checkpoint in `folder`.

    Raises:
        ModelError: the folder holds no LLaVA checkpoint, or one with a feature vtexport has not.
    """
    from vtexport.models import llava

    config = read_config(folder)
    kind = config.get("model_type")
    if kind != llava.MODEL_TYPE:
        named = f"a {kind!r} model" if kind else "a config.json without model_type"
        raise ModelError(
            f"{folder} holds {named}, not LLaVA; vtexport reads checkpoints of model_type {llava.MODEL_TYPE!r}"
        )
    return llava.spec_from_config(folder, config)
