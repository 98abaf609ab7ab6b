"""Random LLaVA checkpoints of any geometry, made by transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.models.resolve import engines_folder

MICRO = engines_folder() / "micro-llava"


def random_checkpoint(
    folder: Path,
    seed: int,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a random checkpoint into `folder`; micro-llava's tokenizer, an image processor of its size.

    Weights are scaled up from their initial values so that attention is not flat and ties are absent.
    """
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 40,
        "patch_size": 8,
    }
    language = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    made = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**sizes, **(vision or {})}),
        text_config=LlamaConfig(**{**language, **(text or {})}),
        image_token_index=4,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **config},
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if name not in ("config.json", "generation_config.json") and (MICRO / name).is_file():
            shutil.copyfile(MICRO / name, folder / name)
    processor = json.loads((folder / "processor_config.json").read_text())
    size = made.vision_config.image_size
    processor["image_processor"]["size"] = {"shortest_edge": size}
    processor["image_processor"]["crop_size"] = {"height": size, "width": size}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def random_clip(folder: Path, seed: int, width: int, *, eos: int = 3, **text: Any) -> Path:
    """Write a random CLIP checkpoint into `folder`: text tower of 24 positions, a word-level tokenizer.

    Args:
        folder: where to.
        seed: of the weights.
        width: of the vision tower, which has to be LLaVA's.
        eos: the end token's id; 2 is what old configs say whatever it is.
        **text: changes to the text tower.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 24,
        "bos_token_id": 1,
        "eos_token_id": eos,
    }
    vision = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    end = 63 if eos == 2 else eos
    words = ["<pad>", "<s>", "<unk>", "what", "digit", "is", "red", "where", "the", "?", "how", "many", "are", "there"]
    vocabulary = {word: number for number, word in enumerate(words) if number != end}
    vocabulary |= {"what": 20, "</s>": end}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", end)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def rename_tensors(folder: Path, rules: dict[str, str]) -> None:
    """Rename tensors of `folder` by prefix, as older and newer transformers wrote them."""
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        old = next((prefix for prefix in rules if name.startswith(prefix)), None)
        renamed[name if old is None else rules[old] + name.removeprefix(old)] = tensor
    save_file(renamed, path, metadata={"format": "pt"})
