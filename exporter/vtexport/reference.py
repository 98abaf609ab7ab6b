"""The model as transformers runs it, with a plan's methods in it: what engines are held to.

Nothing of `vtexport.graph` is used here, so agreement with an engine means something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.models.prompt import Prompt
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan, methods_of
from vtexport.pruning.decoder import Attention, DecoderMethod, drop, rows_that_rate
from vtexport.pruning.decoder import Sequence as Rows
from vtexport.pruning.layout import Layout
from vtexport.pruning.vision import TowerLayer, TowerState, prune

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ReferenceVision:
    """visual [1, K, C], kept [1, K'] int32 or None, score [1, V] or None; spread of CLS's attention in patches."""

    visual: Any
    kept: Array | None
    score: Array | None
    spread: float


@dataclass(frozen=True)
class ReferenceAnswer:
    """What the decoder gives.

    Attributes:
        logits: [1 + new tokens, vocabulary] after the prompt and after each further token.
        kept: by stage, indices [K'] int32 into its input.
        score: by stage, scores [V].
    """

    logits: Array
    kept: dict[str, Array] = field(default_factory=dict)
    score: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerAttention:
    """Rotated queries [B, S, H * D] and keys [B, S, G * D] of one decoder layer."""

    query: Any
    key: Any


class ReferenceModel:
    """transformers' LlavaForConditionalGeneration in fp32 with eager attention, one row at a time."""

    def __init__(self, folder: Path, spec: ModelSpec, clip: Path | None = None) -> None:
        import torch
        from transformers import CLIPModel, LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
        ).eval()
        self.spec = spec
        self.clip: Any = None
        if clip is not None:
            self.clip = CLIPModel.from_pretrained(
                clip, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
            ).eval()

    def vision(self, pixels: Array, plan: PruningPlan, question_ids: Array | None = None) -> ReferenceVision:
        """Features by transformers, pruned by the plan's method, projected by transformers.

        Args:
            pixels: [1, 3, S, S].
            plan: the plan.
            question_ids: [1, L] int64, for a method that reads the question.
        """
        import torch

        v = self.spec.vision
        tower = self.model.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers[: v.feature_layer]
        parts = [getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj")]
        with torch.inference_mode(), _outputs_of(parts) as seen:
            states = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        split = [seen[part].unflatten(2, (v.num_heads, v.head_size)).transpose(1, 2) for part in parts]
        attention = [TowerLayer(q[:, :, :1], k) for q, k in zip(split[::2], split[1::2], strict=True)]
        project = self.model.model.multi_modal_projector
        features = states[v.feature_layer]
        relevance = None if question_ids is None else self._relevance(features[:, 1:], torch.from_numpy(question_ids))
        state = TowerState(features, attention, v.head_size**-0.5, v.grid, project, relevance)
        method, _ = methods_of(plan.method)
        constants = {k: torch.from_numpy(a) for k, a in method.constants(plan, v.grid).items()}
        with torch.inference_mode():
            pruned = prune(method, plan, state, constants)
            spread = float(state.spread()[0])
        kept = None if pruned.index is None else pruned.index.numpy()
        return ReferenceVision(pruned.tokens, kept, None if pruned.score is None else pruned.score.numpy(), spread)

    def _relevance(self, patches: Any, ids: Any) -> Any:
        """Cosine [1, V] of every patch and the question in the space that CLIP's towers share."""
        import torch

        with torch.inference_mode():
            embedded = self.clip.visual_projection(self.clip.vision_model.post_layernorm(patches))
            question = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
            return torch.cosine_similarity(embedded, question[:, None], dim=2)

    def answer(
        self,
        prompt: Prompt,
        visual: Any,
        new_tokens: Sequence[int],
        plan: PruningPlan,
        forced: Mapping[str, Array] | None = None,
        ranking: Array | None = None,
    ) -> ReferenceAnswer:
        """The decoder on a prompt, its image as `visual` [1, K, C], and `new_tokens` after it, in one pass.

        Causality makes this what decoding token by token yields: no pruning looks at anything behind the prompt.

        Args:
            prompt: the prompt.
            visual: projected visual tokens.
            new_tokens: tokens after the prompt.
            plan: the plan whose decoder stages prune.
            forced: by stage, indices to keep instead of those of highest score.
            ranking: scores [V] for a method that is given them.
        """
        import torch

        _, method = methods_of(plan.method)
        with torch.inference_mode():
            rows, text, image = self._embed(prompt, visual, new_tokens)
            raters = None if method is None else method.rating_rows(image, text, rows.layout)
            kept: dict[str, Array] = {}
            score: dict[str, Array] = {}
            for number in range(self.spec.decoder.num_layers):
                hidden, attention = self.layer(number, rows)
                rows = Rows(hidden, rows.positions, rows.layout)
                stage = plan.decoder_stages.get(number)
                if stage is None:
                    continue
                assert method is not None, "a plan with decoder stages has a decoder-stage method"
                given = None if forced is None or stage.where not in forced else torch.from_numpy(forced[stage.where])
                rate = partial(self._score, method, number, rows, raters, attention, ranking)
                dropped = drop(method, plan, stage, rows, rate, None if given is None else given[None])
                rows = dropped.sequence
                if dropped.index is not None and dropped.score is not None:
                    kept[stage.where], score[stage.where] = dropped.index[0].numpy(), dropped.score[0].numpy()
            last = rows.hidden[:, rows.hidden.shape[1] - 1 - len(new_tokens) :]
            logits = self.model.lm_head(self.model.model.language_model.norm(last))[0].float().numpy()
        return ReferenceAnswer(logits, kept, score)

    def rater_attention(self, prompt: Prompt, visual: Any) -> Iterator[Any]:
        """Of every layer of the dense decoder, the attention of SparseVLM's text raters to the image, head mean [R, V].

        Args:
            prompt: the prompt.
            visual: [1, V, C], projected visual tokens.
        """
        import torch

        from vtexport.pruning.plain import attention_rows
        from vtexport.pruning.raters import text_raters

        with torch.inference_mode():
            rows, text, image = self._embed(prompt, visual, ())
            raters = text_raters(image, text, rows.layout.after_image())
            places = rows.layout.text_places()[raters][None]
            start = prompt.image_position
            for number in range(self.spec.decoder.num_layers):
                hidden, own = self.layer(number, rows)
                size = self.spec.decoder.head_size
                query = rows.layout.rows_of(own.query, places).unflatten(2, (-1, size)).transpose(1, 2)
                key = own.key.unflatten(2, (-1, size)).transpose(1, 2)
                attention = attention_rows(query, key, places, size**-0.5).mean(dim=1)[0]
                yield attention[:, start : start + image.shape[1]]
                rows = Rows(hidden, rows.positions, rows.layout)

    def layer(self, number: int, rows: Rows) -> tuple[Any, LayerAttention]:
        """Decoder layer `number` on rows without padding: its output [B, S, C], and its attention."""
        import torch

        layer = self.model.model.language_model.layers[number]
        width = rows.hidden.shape[1]
        causal = torch.full((width, width), -torch.inf).triu(1)[None, None]
        rope = self.model.model.language_model.rotary_emb(rows.hidden, position_ids=rows.positions)
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj]
        with _outputs_of(parts) as seen:
            out = layer(rows.hidden, attention_mask=causal, position_ids=rows.positions, position_embeddings=rope)
        hidden = out[0] if isinstance(out, tuple) else out
        return hidden, self._rotated(seen[parts[0]], seen[parts[1]], rope)

    def _embed(self, prompt: Prompt, visual: Any, new_tokens: Sequence[int]) -> tuple[Rows, Any, Any]:
        """The decoder's input rows, and text and visual embeddings apart."""
        import torch

        text = self.model.get_input_embeddings()(torch.tensor([[*prompt.token_ids, *new_tokens]]))
        image, at = torch.as_tensor(visual), prompt.image_position
        hidden = torch.cat([text[:, :at], image, text[:, at:]], dim=1)
        length = torch.tensor([len(prompt.token_ids)])
        layout = Layout(torch.tensor([at]), length, text.shape[1], image.shape[1])
        return Rows(hidden, torch.arange(hidden.shape[1])[None], layout), text, image

    def _rotated(self, query: Any, key: Any, rope: tuple[Any, Any]) -> LayerAttention:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        size = self.spec.decoder.head_size
        split = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (query, key))
        return LayerAttention(*(x.transpose(1, 2).flatten(2) for x in apply_rotary_pos_emb(*split, *rope)))

    def _score(
        self, method: DecoderMethod, number: int, rows: Rows, raters: Any, own: LayerAttention, ranking: Any
    ) -> Any:
        """Scores [1, V] at the stage after layer `number`."""
        import torch

        if method.raters == "given":
            return torch.from_numpy(ranking)[None]
        return method.score(self._attention(method, number, rows, raters, own), rows.layout)

    def _attention(self, method: DecoderMethod, number: int, rows: Rows, raters: Any, own: LayerAttention) -> Attention:
        """What rates at the stage after layer `number`."""
        d, model = self.spec.decoder, self.model.model.language_model
        found = own
        rope = model.rotary_emb(rows.hidden, position_ids=rows.positions)
        if method.attention_of == "next":
            following = model.layers[number + 1]
            x = following.input_layernorm(rows.hidden)
            found = self._rotated(following.self_attn.q_proj(x), following.self_attn.k_proj(x), rope)
        places, counted = rows_that_rate(method, rows.layout, raters)
        query = rows.layout.rows_of(found.query, places)
        scale = d.head_size**-0.5
        return Attention(
            query, found.key, d.num_heads, d.num_kv_heads, scale, counted, places, rows.positions, self._cosines()
        )

    def _cosines(self) -> Any:
        from vtexport.models.llava import rope_tables

        return rope_tables(self.spec)[0]


@contextmanager
def _outputs_of(modules: Sequence[Any]):  # type: ignore[no-untyped-def]
    """What `modules` put out while the context is open, by module."""
    seen: dict[Any, Any] = {}

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        seen[module] = output

    hook: Callable[..., None] = keep
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
