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
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
)

from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.models.resolve import engines_folder
from vtexport.models.shrink import randomised

MICRO = engines_folder() / "micro-llava"
_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 40,
    "patch_size": 8,
}
_TEXT = {
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
    made = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**_VISION, **(vision or {})}),
        text_config=LlamaConfig(**{**_TEXT, **(text or {})}),
        image_token_index=4,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **config},
    )
    torch.manual_seed(seed)
    randomised(LlavaForConditionalGeneration(made)).save_pretrained(folder)
    _copy_processor(folder, made.vision_config.image_size)
    return folder


_TILES = 40
_PINPOINTS = [[_TILES, 2 * _TILES], [2 * _TILES, _TILES], [2 * _TILES, 2 * _TILES], [3 * _TILES, _TILES]]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
#: families by the name of a case: model, tower and decoder configurations, and changes to the decoder
FAMILIES: dict[str, tuple[type, type, type, dict[str, Any]]] = {
    "llava": (LlavaConfig, CLIPVisionConfig, LlamaConfig, {}),
    "llava_next-vicuna": (LlavaNextConfig, CLIPVisionConfig, LlamaConfig, {"num_key_value_heads": 4}),
    "llava_next-mistral": (LlavaNextConfig, CLIPVisionConfig, MistralConfig, {"sliding_window": 300}),
    "llava_next-llama3": (LlavaNextConfig, CLIPVisionConfig, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "video_llava": (VideoLlavaConfig, CLIPVisionConfig, LlamaConfig, {}),
    "llava_onevision": (LlavaOnevisionConfig, SiglipVisionConfig, Qwen2Config, {"tie_word_embeddings": True}),
}
_PROCESSORS = {
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "video_llava": "VideoLlavaImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}


def family_checkpoint(folder: Path, case: str, seed: int = 3, **text: Any) -> Path:
    """Write a random checkpoint of a family into `folder`: five decoder layers, 25 patches a view, tiles of 40 pixels.

    Args:
        folder: where to.
        case: a key of `FAMILIES`.
        seed: of the weights.
        **text: changes to the decoder.
    """
    config, tower, decoder, changes = FAMILIES[case]
    family = case.partition("-")[0]
    siglip = tower is SiglipVisionConfig
    # SigLIP's patches need not fill the image.
    size = _TILES + 3 * siglip
    pinpoints = [[rows // _TILES * size, columns // _TILES * size] for rows, columns in _PINPOINTS]
    changes = {"num_hidden_layers": 5, **changes, **text}
    tied = changes.get("tie_word_embeddings", False)
    video = {"video_token_index": 5} if family == "video_llava" else {}
    made = config(
        vision_config=tower(**{**_VISION, "image_size": size}, **({"vision_use_head": False} if siglip else {})),
        text_config=decoder(**{**_TEXT, **changes}),
        image_token_index=4,
        tie_word_embeddings=tied,
        **({"image_grid_pinpoints": pinpoints} if "grid" in str(config.__annotations__) else {}),
        **video,
    )
    torch.manual_seed(seed)
    randomised(AutoModelForImageTextToText.from_config(made)).save_pretrained(folder)
    _copy_processor(folder, size)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["image_processor_type"] = _PROCESSORS[family]
    if family.startswith("llava_"):
        processor["image_processor"]["image_grid_pinpoints"] = pinpoints
    if siglip:
        processor["image_processor"] |= {"size": {"height": size, "width": size}, "do_center_crop": None}
        processor["image_processor"].pop("crop_size")
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if family == "video_llava":
        _speak_of_videos(folder)
    return folder


def _speak_of_videos(folder: Path) -> None:
    """Give micro-llava's tokenizer and template a mark for videos, token 5."""
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'image'", "'video'").replace("<image>", "<video>"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    old = next(token for token, number in tokenizer["model"]["vocab"].items() if number == 5)
    tokenizer["model"]["vocab"]["<video>"] = tokenizer["model"]["vocab"].pop(old)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if old not in pair]
    mark = next(token for token in tokenizer["added_tokens"] if token["id"] == 4)
    tokenizer["added_tokens"].append({**mark, "id": 5, "content": "<video>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


#: the geometry of LLaVA-1.5, but for what `random_checkpoint`'s tokenizer wants otherwise
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAVA_15 = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def sparse_checkpoint(folder: Path, size: str, shards: int = 3) -> Path:
    """Write a LLaVA-1.5 of that size into `folder`: its names, shapes and shards, in fp16; weights are holes in the files."""
    made = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L, image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(**LLAVA_15[size], vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        torch_dtype="float16",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(made)
    renamed = (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    )
    tensors = []
    for name, tensor in model.state_dict().items():
        ours, theirs = next(((old, new) for old, new in renamed if name.startswith(old)), ("", ""))
        tensors.append((theirs + name.removeprefix(ours), list(tensor.shape), 2 * tensor.numel()))
    folder.mkdir(parents=True)
    share, place = sum(size for *_, size in tensors) / shards, {}
    for number in range(shards):
        name, header, offset = f"model-{number + 1:05}-of-{shards:05}.safetensors", {}, 0
        while tensors and (offset < share or number == shards - 1):
            key, shape, length = tensors.pop(0)
            header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + length]}
            place[key], offset = name, offset + length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    made.save_pretrained(folder)
    _copy_processor(folder, 336)
    return folder


def _copy_processor(folder: Path, size: int) -> None:
    """micro-llava's tokenizer, and its image processor for images of another size."""
    for name in PROCESSOR_FILES:
        if name not in ("config.json", "generation_config.json") and (MICRO / name).is_file():
            shutil.copyfile(MICRO / name, folder / name)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": size}
    processor["image_processor"]["crop_size"] = {"height": size, "width": size}
    (folder / "processor_config.json").write_text(json.dumps(processor))


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
