"""Sides of a comparison that run on transformers: the model as it is, and pruning hooked into it as research code does."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtexport.pruning import PruningPlan


class Transformers:
    """transformers in fp32 with sdpa: its own processor, its own cache, greedy."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.image_size: int = self.model.config.vision_config.image_size

    def inputs(self, image: Any, question: str) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(images=image, text=text, return_tensors="pt")

    def run(self, image: Any, question: str, new_tokens: int) -> dict[str, Any]:
        """Milliseconds to the first token, per token and in total, and the greedy tokens."""
        with torch.inference_mode():
            start = time.perf_counter()
            logits, state = self.prefill(self.inputs(image, question))
            tokens = [int(logits.argmax())]
            first = 1000 * (time.perf_counter() - start)
            steps = []
            for step in range(new_tokens - 1):
                began = time.perf_counter()
                logits = self.decode(tokens[-1], state, step)
                tokens.append(int(logits.argmax()))
                steps.append(1000 * (time.perf_counter() - began))
        return {"first_token": first, "per_token": median(steps), "total": first + sum(steps), "tokens": tokens}

    def prefill(self, inputs: Any) -> tuple[Tensor, Any]:
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    def decode(self, token: int, state: Any, step: int) -> Tensor:
        logits: Tensor = self.model(input_ids=torch.tensor([[token]]), past_key_values=state, use_cache=True).logits
        return logits[0, -1]


class HookedSparseVLM(Transformers):
    """SparseVLM written into transformers' decoder loop the way research code does it.

    One image at a time. A pruning layer computes the whole attention map and reads the raters' rows from it; all other
    attention is sdpa. The schedule and the tokens are the engine's.
    """

    def __init__(self, folder: Path, plan: PruningPlan) -> None:
        super().__init__(folder)
        self.plan = plan

    def prefill(self, inputs: Any) -> tuple[Tensor, Any]:
        llava, language = self.model.model, self.model.model.language_model
        ids = inputs["input_ids"][0]
        image = (ids == self.model.config.image_token_id).nonzero().flatten()
        start, count = int(image[0]), len(image)
        hidden = self.model.get_input_embeddings()(ids)
        visual = llava.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        hidden = torch.cat([hidden[:start], visual, hidden[start + count :]])[None]
        m = torch.softmax(visual @ hidden[0, start + count :].T, dim=1).mean(dim=0)
        raters = (m > m.mean()).nonzero().flatten()
        cache = DynamicCache()
        stages = self.plan.decoder_stages
        for number, layer in enumerate(language.layers):
            positions = torch.arange(hidden.shape[1])[None]
            rope = language.rotary_emb(hidden, position_ids=positions)
            attention = self._map(layer, hidden, rope) if number in stages else None
            hidden = layer(hidden, attention_mask=None, position_embeddings=rope, past_key_values=cache)
            if attention is not None:
                rows = attention[0, :, start + count + raters, start : start + count]
                hidden = self._prune(hidden, rows.mean(dim=(0, 1)), stages[number].kept, start, count)
                count = stages[number].carried
        return self.model.lm_head(language.norm(hidden[:, -1:]))[0, -1], cache

    def decode(self, token: int, state: Any, step: int) -> Tensor:
        language = self.model.model.language_model
        hidden = self.model.get_input_embeddings()(torch.tensor([[token]]))
        for number, layer in enumerate(language.layers):
            position = torch.tensor([[state.get_seq_length(number)]])
            rope = language.rotary_emb(hidden, position_ids=position)
            hidden = layer(hidden, attention_mask=None, position_embeddings=rope, past_key_values=state)
        logits: Tensor = self.model.lm_head(language.norm(hidden))
        return logits[0, -1]

    def _map(self, layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The whole causal attention map [1, H, S, S] of a layer."""
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        size = attention.head_dim
        query, key = (p(x).unflatten(2, (-1, size)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *rope)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        future = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1)
        return torch.softmax((query @ key.transpose(2, 3) / math.sqrt(size)).masked_fill(future, -torch.inf), dim=-1)

    def _prune(self, hidden: Tensor, score: Tensor, keep: int, start: int, count: int) -> Tensor:
        image = hidden[0, start : start + count]
        order = score.argsort(descending=True, stable=True)
        kept = order[:keep].sort().values
        size = int(0.3 * (count - keep)) + 1
        clusters = int(0.1 * size) + 1
        pool = image[order[keep : keep + size].sort().values]
        distance = torch.cdist(pool, pool) / math.sqrt(pool.shape[1])
        density = -distance.square().topk(clusters, largest=False).values.mean(dim=1)
        denser = density[None] > density[:, None]
        delta = torch.where(denser, distance, distance.max()).amin(dim=1)
        centres = (delta.log() + density).topk(clusters).indices
        joined = distance[:, centres].argmin(dim=1)
        joined[centres] = torch.arange(clusters)
        merged = torch.stack([pool[joined == number].mean(dim=0) for number in range(clusters)])
        parts = [hidden[0, :start], image[kept], merged, hidden[0, start + count :]]
        return torch.cat(parts)[None]
