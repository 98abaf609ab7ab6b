"""A random model with the layers, tokens and positions of a large one, and a width that any machine can hold."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtexport.models.checkpoint import Checkpoint
from vtexport.models.clip import read_clip
from vtexport.models.families import read_spec
from vtexport.models.family import parse_config
from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.models.spec import ModelSpec

_HEAD_SIZE = 8
_HEADS = 4


@dataclass(frozen=True)
class Small:
    """The model that `shrink` wrote: its geometry, its weights, and the folder of its CLIP, if any."""

    spec: ModelSpec
    checkpoint: Checkpoint
    clip: Path | None


def shrink(spec: ModelSpec, processor: Path, clip: Path | None, folder: Path) -> Small:
    """Write a small model like `spec` into `folder`, with `processor`'s files, and a small CLIP if `clip` is given.

    Query heads per key head, layers, image and patch size, positions, RoPE and vocabulary stay. Weights are random, and
    large enough that attention is not flat and no two scores are near.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = parse_config(folder / "config.json", spec.config)
    text, vision, d = config.text_config, config.vision_config, spec.decoder
    text.num_key_value_heads = min(d.num_kv_heads, _HEADS)
    text.num_attention_heads = text.num_key_value_heads * (d.num_heads // d.num_kv_heads)
    text.head_dim = _HEAD_SIZE
    text.hidden_size = text.num_attention_heads * _HEAD_SIZE
    text.intermediate_size = 2 * text.hidden_size
    _narrow(vision)
    torch.manual_seed(0)
    randomised(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if name not in ("config.json", "generation_config.json") and (processor / name).is_file():
            shutil.copyfile(processor / name, folder / name)
    written = Small(read_spec(folder, spec.choice), Checkpoint.open(folder), None)
    if clip is None:
        return written
    small = _shrunken_clip(clip, vision.hidden_size, folder / "clip")
    joined = written.checkpoint.joined("clip.", Checkpoint.open(small))
    return Small(replace(written.spec, clip=read_clip(small, written.spec.vision)), joined, small)


def _shrunken_clip(source: Path, width: int, folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.h5", "*.msgpack"))
    config = CLIPConfig.from_pretrained(source)
    _narrow(config.text_config)
    _narrow(config.vision_config)
    config.vision_config.hidden_size = width
    config.projection_dim = width
    randomised(CLIPModel(config)).save_pretrained(folder)
    return folder


def _narrow(config: Any) -> None:
    config.num_attention_heads = _HEADS
    config.hidden_size = _HEADS * _HEAD_SIZE
    config.intermediate_size = 2 * config.hidden_size


def randomised(model: Any) -> Any:
    """`model`, a PyTorch module, with weights large enough that attention is not flat and ties are absent."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
