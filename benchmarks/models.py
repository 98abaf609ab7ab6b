"""LLaVAs of random weights, large enough that matrix products dominate the time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.models.resolve import resolve_model


def half_billion_llava(folder: Path, tiles: int = 0) -> Path:
    """Write the checkpoint into `folder`: CLIP-B/14 at 336 pixels (576 visual tokens), a 24-layer Llama of width 1,024.

    With `tiles`, it is a LLaVA-1.6 whose images have as many tiles in a row and in a column: with 2, 2,880 visual tokens,
    newlines apart.
    """
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    decoder = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
    return random_llava(folder, tower, decoder, tiles=tiles)


def random_llava(
    folder: Path, tower: dict[str, int], decoder: dict[str, int], dtype: str = "float32", tiles: int = 0
) -> Path:
    """Write a LLaVA of random weights into `folder`: a CLIP of 576 visual tokens and a Llama of these sizes."""
    import torch
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**tower, image_size=336, patch_size=14),
        "text_config": LlamaConfig(
            **decoder,
            vocab_size=32064,
            num_key_value_heads=decoder["num_attention_heads"],
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        "image_token_index": 4,
    }
    grid = [[336 * tiles, 336 * tiles]]
    config = LlavaNextConfig(**parts, image_grid_pinpoints=grid) if tiles else LlavaConfig(**parts)
    AutoModelForImageTextToText.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    _processor_files(folder, config.vision_config)
    if tiles:
        path = folder / "processor_config.json"
        processor: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        processor["image_processor"]["image_processor_type"] = "LlavaNextImageProcessor"
        processor["image_processor"]["image_grid_pinpoints"] = grid
        path.write_text(json.dumps(processor), encoding="utf-8")
    return folder


def _processor_files(folder: Path, vision: Any) -> Path:
    """Put micro-llava's processor files into a checkpoint's folder, for images of its own tower's size."""
    micro = resolve_model("micro-llava")
    for name in PROCESSOR_FILES:
        if name not in ("config.json", "generation_config.json") and (micro / name).is_file():
            shutil.copyfile(micro / name, folder / name)
    path, size = folder / "processor_config.json", vision.image_size
    processor: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    processor["patch_size"] = vision.patch_size
    processor["image_processor"]["size"] = {"shortest_edge": size}
    processor["image_processor"]["crop_size"] = {"height": size, "width": size}
    path.write_text(json.dumps(processor), encoding="utf-8")
    return folder
