"""The model as transformers runs it, with a plan's method between tower and projector: what engines are held to.

Nothing of `vtexport.graph` is used here, so agreement with an engine means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.models.prompt import Prompt
from vtexport.models.spec import ModelSpec
from vtexport.pruning import METHODS, PruningPlan
from vtexport.pruning.base import TowerState, prune

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ReferenceVision:
    """visual [1, K, C], kept [1, K'] int32 or None, score [1, V] or None."""

    visual: Any
    kept: Array | None
    score: Array | None


class ReferenceModel:
    """transformers' LlavaForConditionalGeneration in fp32 with eager attention, one row at a time."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        import torch
        from transformers import LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
        ).eval()
        self.spec = spec

    def vision(self, pixels: Array, plan: PruningPlan) -> ReferenceVision:
        """Features by transformers, pruned by the plan's method, projected by transformers; pixels [1, 3, S, S]."""
        import torch

        v = self.spec.vision
        tower = self.model.model.vision_tower
        attention = getattr(tower, "vision_model", tower).encoder.layers[v.feature_layer - 1].self_attn
        seen: dict[str, Any] = {}
        hooks = [
            getattr(attention, name).register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.__setitem__(name, output)
            )
            for name in ("q_proj", "k_proj")
        ]
        try:
            with torch.inference_mode():
                states = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        finally:
            for hook in hooks:
                hook.remove()
        query, key = (
            seen[name].unflatten(2, (v.num_heads, v.head_size)).transpose(1, 2) for name in ("q_proj", "k_proj")
        )
        method = METHODS[plan.method]
        state = TowerState(states[v.feature_layer], query[:, :, :1], key, v.head_size**-0.5, v.grid)
        constants = {k: torch.from_numpy(a) for k, a in method.constants(plan, v.grid).items()}
        with torch.inference_mode():
            pruned = prune(method, plan, state, constants)
            visual = self.model.model.multi_modal_projector(pruned.tokens)
        kept = None if pruned.index is None else pruned.index.numpy()
        return ReferenceVision(visual, kept, None if pruned.score is None else pruned.score.numpy())

    def logits(self, prompt: Prompt, visual: Any, new_tokens: Sequence[int]) -> Array:
        """Logits [1 + len(new_tokens), vocabulary] after the prompt and after each further token."""
        import torch

        ids = torch.tensor([prompt.token_ids])
        further = torch.tensor([list(new_tokens)], dtype=torch.long)
        embed = self.model.get_input_embeddings()
        with torch.inference_mode():
            text, at = embed(ids), prompt.image_position
            rows = torch.cat([text[:, :at], torch.as_tensor(visual), text[:, at:], embed(further)], dim=1)
            states = self.model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
            wanted = states[:, states.shape[1] - 1 - len(new_tokens) :]
            result: Array = self.model.lm_head(wanted)[0].float().numpy()
        return result
