"""The family `llava`: LLaVA-1.5 checkpoints in Hugging Face form (CLIP tower, two-layer projector, Llama)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vtexport.errors import ModelError
from vtexport.models.checkpoint import Checkpoint
from vtexport.models.spec import DecoderSpec, ModelSpec, VisionSpec

MODEL_TYPE = "llava"

# A tensor's name in a checkpoint has changed with transformers' versions; ours -> theirs, newest first.
PREFIXES: dict[str, tuple[str, ...]] = {
    "vision.": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    ),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "decoder.": ("language_model.model.", "model.language_model.", "model.language_model.model."),
    "head.": ("language_model.lm_head.", "lm_head."),
    # A CLIP checkpoint's own names, joined to LLaVA's under this prefix.
    "clip.": ("clip.",),
}

_SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


def spec_from_config(folder: Path, config: dict[str, Any]) -> ModelSpec:
    """Read the geometry through transformers' own configuration classes, which know every default.

    Raises:
        ModelError: a feature of the checkpoint is one that the graphs do not have.
    """
    from transformers import LlavaConfig

    try:
        parsed = LlavaConfig.from_dict(config)
    except Exception as error:  # transformers raises whatever its validators raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{folder / 'config.json'} is not a valid LLaVA config ({reason}); get the checkpoint again"
        ) from error

    def refuse(what: str, remedy: str) -> ModelError:
        return ModelError(f"{folder / 'config.json'}: {what}; {remedy}")

    vision, text = parsed.vision_config, parsed.text_config
    if vision.model_type not in ("clip_vision_model", "clip"):
        raise refuse(f"the vision tower is {vision.model_type!r}", "only CLIP towers are supported")
    if text.model_type != "llama":
        raise refuse(f"the language model is {text.model_type!r}", "only Llama is supported")
    layer = parsed.vision_feature_layer
    if not isinstance(layer, int):
        raise refuse(f"vision_feature_layer is {layer!r}", "only a single layer is supported")
    feature_layer = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    if not 0 < feature_layer <= vision.num_hidden_layers:
        raise refuse(f"vision_feature_layer {layer} is outside the tower", "check the config")
    strategy = parsed.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise refuse(f"vision_feature_select_strategy is {strategy!r}", "use 'default' or 'full'")
    rope = text.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in _SUPPORTED_ROPE:
        raise refuse(
            f"RoPE of type {kind!r} changes with the sequence length, which a compiled table cannot",
            f"supported are {', '.join(_SUPPORTED_ROPE)}",
        )
    if vision.image_size % vision.patch_size:
        raise refuse(f"image_size {vision.image_size} is not a multiple of patch_size", "check the config")
    return ModelSpec(
        family=MODEL_TYPE,
        vision=VisionSpec(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            channels=vision.num_channels,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            activation=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
            feature_layer=feature_layer,
            strategy=strategy,
        ),
        decoder=DecoderSpec(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_size=text.head_dim or text.hidden_size // text.num_attention_heads,
            activation=text.hidden_act,
            rms_norm_eps=text.rms_norm_eps,
            max_positions=text.max_position_embeddings,
            # transformers ties LLaVA's head by either flag.
            tied_embeddings=bool(parsed.tie_word_embeddings or text.tie_word_embeddings),
            attention_bias=bool(text.attention_bias),
            mlp_bias=bool(text.mlp_bias),
        ),
        projector_bias=bool(parsed.multimodal_projector_bias),
        projector_activation=parsed.projector_hidden_act,
        image_token_id=parsed.image_token_id,
        eos_token_ids=_eos_ids(folder, text.eos_token_id),
        config=config,
    )


def _eos_ids(folder: Path, from_config: int | list[int] | None) -> tuple[int, ...]:
    """End tokens: generation_config.json's, which generate() obeys, else the language model's."""
    path = folder / "generation_config.json"
    found = from_config
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", found)
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is not readable JSON ({error}); download it again") from error
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


def rope_tables(spec: ModelSpec) -> tuple[Any, Any]:
    """The tables cos and sin, float32 [max_positions, head_size / 2], by transformers' own RoPE initialisers.

    Attention scaling (yarn) is folded into both tables, as in transformers' rotary embedding.
    """
    import torch
    from transformers import LlavaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = LlavaConfig.from_dict(spec.config).text_config
    rotary = LlamaRotaryEmbedding(text)
    position = torch.arange(spec.decoder.max_positions)[None]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), position)
    half = spec.decoder.head_size // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def rope_reach(spec: ModelSpec) -> int:
    """The first distance at which RoPE, applied to two vectors of ones, yields no positive product.

    sparsevlm-plus divides attention by that product (SparseVLM's released version 2.0), so no visual token
    may lie that far from a text token. `max_positions` if every distance is positive.
    """
    cos, _ = rope_tables(spec)
    negative = (cos.sum(dim=1) <= 0).nonzero()
    return int(negative[0]) if len(negative) else spec.decoder.max_positions


def fingerprint(checkpoint: Checkpoint) -> str:
    """A short name for this checkpoint's weights: of every tensor's name and shape, and the final norm's values.

    Two fine-tunings of one model differ in it; reading it costs one small tensor.
    """
    digest = hashlib.sha256()
    for name, record in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {record.shape}".encode())
    norm = checkpoint.find(PREFIXES["decoder."], "norm.weight")
    with norm.path.open("rb") as file:
        file.seek(norm.start)
        digest.update(file.read(norm.end - norm.start))
    return digest.hexdigest()[:16]
