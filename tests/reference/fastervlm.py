"""FasterVLM as its paper states it, on transformers' own attention maps; written apart from vtexport.pruning."""

from __future__ import annotations

import numpy as np
import torch


def cls_scores(model: torch.nn.Module, pixels: torch.Tensor, feature_layer: int) -> np.ndarray:
    """Head-mean CLS row over patches [B, V] of the layer whose output is hidden_states[feature_layer]."""
    tower = model.model.vision_tower
    with torch.inference_mode():
        maps = tower(pixels, output_attentions=True).attentions
    number_of_layers = len(maps)
    layer = feature_layer - 1 if feature_layer > 0 else number_of_layers + feature_layer
    scores = []
    for sample in maps[layer]:
        total = torch.zeros(sample.shape[-1] - 1)
        for head in sample:
            total += head[0, 1:]
        scores.append((total / len(sample)).numpy())
    return np.stack(scores)


def kept_patches(scores: np.ndarray, count: int) -> list[list[int]]:
    """The `count` patches of highest score per row, ascending; of equal scores the lower index."""
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]) for row in scores]
