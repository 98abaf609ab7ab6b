"""LLaVA answering greedily with transformers' generate, on any given visual tokens."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from vtexport.models import Prompt


def load(folder) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def visual_tokens(model, pixels: torch.Tensor, kept: np.ndarray | None) -> torch.Tensor:
    """The projected image features of one image by transformers, all or those at `kept` [1, K, C]."""
    with torch.inference_mode():
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output[0]
    return features[None] if kept is None else features[None, torch.as_tensor(kept, dtype=torch.long)]


def greedy(model, prompt: Prompt, visual: torch.Tensor, new_tokens: int) -> list[int]:
    """`new_tokens` greedy tokens after the prompt, its image given as `visual`; no end token stops it."""
    with torch.inference_mode():
        text = model.get_input_embeddings()(torch.tensor([prompt.token_ids]))
        at = prompt.image_positions[0]
        rows = torch.cat([text[:, :at], visual, text[:, at:]], dim=1)
        out = model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=3,
        )
    return out[0].tolist()
