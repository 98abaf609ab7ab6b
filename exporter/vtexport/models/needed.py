"""The tensors that a model's graphs are filled with, by their names there: known before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtexport.errors import ModelError
from vtexport.models.bounds import shown
from vtexport.models.checkpoint import NEAREST, Checkpoint, TensorRecord
from vtexport.models.names import PREFIXES
from vtexport.models.spec import ClipSpec, ModelSpec, VisionSpec

Shape = tuple[int, ...]


def needed(spec: ModelSpec) -> dict[str, Shape]:
    """The name of each weight in the graphs of a dense engine, and its shape.

    A method's constants and the tables of RoPE are computed, and not among them.
    """
    v, d = spec.vision, spec.decoder
    shapes = _tower(v)
    shapes |= _linear("projector.linear_1", v.hidden_size, d.hidden_size, spec.projector_bias)
    shapes |= _linear("projector.linear_2", d.hidden_size, d.hidden_size, spec.projector_bias)
    if spec.views.newlines:
        shapes["image_newline"] = (d.hidden_size,)
    wide, narrow = d.num_heads * d.head_size, d.num_kv_heads * d.head_size
    shapes |= {"decoder.embed_tokens.weight": (d.vocab_size, d.hidden_size), "decoder.norm.weight": (d.hidden_size,)}
    for number in range(d.num_layers):
        at = f"decoder.layers.{number}"
        shapes |= {f"{at}.{norm}.weight": (d.hidden_size,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, width in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
            shapes |= _linear(f"{at}.self_attn.{name}", d.hidden_size, width, d.query_bias)
        shapes |= _linear(f"{at}.self_attn.o_proj", wide, d.hidden_size, d.output_bias)
        for name in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{at}.mlp.{name}", d.hidden_size, d.intermediate_size, d.mlp_bias)
        shapes |= _linear(f"{at}.mlp.down_proj", d.intermediate_size, d.hidden_size, d.mlp_bias)
    if not d.tied_embeddings:
        shapes["head.weight"] = (d.vocab_size, d.hidden_size)
    return shapes if spec.clip is None else {**shapes, **_clip(spec.clip, v)}


def check_weights(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuse a checkpoint that lacks a weight, or has one of another shape or of no floating-point dtype.

    Raises:
        ModelError: it does; the message names the first.
    """
    for name, shape in needed(spec).items():
        record = find(checkpoint, name)
        check_shape(checkpoint.folder, name, record.shape, shape)
        if record.dtype not in NEAREST:
            raise ModelError(
                f"{checkpoint.folder}: tensor {shown(record.name)} has dtype {record.dtype}; vtexport reads weights in "
                f"{', '.join(NEAREST)}, get the checkpoint in one of these"
            )


def check_shape(folder: Path, name: str, found: Shape, wanted: Shape) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ModelError: it is.
    """
    if tuple(found) != wanted:
        raise ModelError(
            f"{folder}: tensor {name} has shape {tuple(found)} but config.json asks for {wanted}; "
            "the checkpoint and its config do not belong together"
        )


def find(checkpoint: Checkpoint, name: str) -> TensorRecord:
    """The checkpoint's tensor for the weight `name` of a graph.

    Raises:
        ModelError: it has none.
    """
    if name in checkpoint.tensors:
        return checkpoint.tensors[name]
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return checkpoint.find(theirs, name.removeprefix(ours))
    raise AssertionError(f"no source for initialiser {name}")


def _tower(v: VisionSpec) -> dict[str, Shape]:
    """The vision tower's, up to the layer whose output is read."""
    at, width = "vision.embeddings", v.hidden_size
    shapes: dict[str, Shape] = {
        f"{at}.patch_embedding.weight": (width, v.channels, v.patch_size, v.patch_size),
        f"{at}.position_embedding.weight": (v.num_patches + v.class_token, width),
    }
    if v.class_token:
        shapes |= {f"{at}.class_embedding": (width,), **_norm("vision.pre_layrnorm", width)}
    if v.kind == "siglip":
        shapes[f"{at}.patch_embedding.bias"] = (width,)
    return shapes | _layers("vision.encoder.layers", v.feature_layer, width, v.intermediate_size)


def _clip(clip: ClipSpec, vision: VisionSpec) -> dict[str, Shape]:
    """Those of CLIP's text tower and of the projections."""
    at, width = "clip.text_model", clip.hidden_size
    return {
        f"{at}.embeddings.token_embedding.weight": (clip.vocab_size, width),
        f"{at}.embeddings.position_embedding.weight": (clip.length, width),
        **_layers(f"{at}.encoder.layers", clip.num_layers, width, clip.intermediate_size),
        **_norm(f"{at}.final_layer_norm", width),
        **_norm("clip.vision_model.post_layernorm", vision.hidden_size),
        "clip.text_projection.weight": (clip.projection, width),
        "clip.visual_projection.weight": (clip.projection, vision.hidden_size),
    }


def _layers(at: str, count: int, width: int, inner: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for number in range(count):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _norm(f"{at}.{number}.{norm}", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{at}.{number}.self_attn.{name}", width, width, True)
        shapes |= _linear(f"{at}.{number}.mlp.fc1", width, inner, True)
        shapes |= _linear(f"{at}.{number}.mlp.fc2", inner, width, True)
    return shapes


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Mapping[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _norm(name: str, width: int) -> Mapping[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
