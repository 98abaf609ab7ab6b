"""The reference that engines are compared with: the model as transformers runs it, pruned by a plan's methods.

Nothing of `vtexport.graph` is used here, so that an error there cannot hide in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vtexport.arrays import Array
from vtexport.models.families import FAMILIES
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ModelSpec
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import Attention, DecoderMethod, DecoderState, drop, rated, rows_that_rate
from vtexport.pruning.layout import Layout
from vtexport.pruning.vision import Pruned, RowOrder, TowerLayer, TowerState, prune


@dataclass(frozen=True)
class ReferenceVision:
    """The output of the vision stage.

    Attributes:
        visual: [1, K, C], padded; `length` counts the visual tokens.
        kept: [1, K'] int32 or None.
        score: [1, V] or None.
        length: visual tokens of each image.
        spread: of CLS's attention, in patches; None with several views or without CLS.
    """

    visual: Any
    kept: Array | None
    score: Array | None
    length: tuple[int, ...]
    spread: float | None


@dataclass(frozen=True)
class ReferenceAnswer:
    """The output of the decoder.

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
    """transformers' model of the checkpoint's family, in fp32 with eager attention, one row at a time.

    Its weights are rounded by `rounding`, functions for the decoder's "layers" and for its "head".
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        clip: Path | None = None,
        rounding: Mapping[str, Callable[[Array], Array] | None] | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, CLIPModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
        ).eval()
        self.spec = spec
        parts = {"layers": self.model.model.language_model.layers, "head": self.model.lm_head}
        for name, rounded in (rounding or {}).items():
            for module in parts[name].modules():
                if rounded is not None and isinstance(module, torch.nn.Linear):
                    # A parameter of its own, because the head's may be that of the embeddings too.
                    weight = torch.from_numpy(rounded(module.weight.data.numpy()))
                    module.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.clip: Any = None
        if clip is not None:
            self.clip = CLIPModel.from_pretrained(
                clip, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
            ).eval()

    def vision(self, views: Views, plan: PruningPlan, extras: Mapping[str, Array] | None = None) -> ReferenceVision:
        """Run the vision tower and the projector of transformers, with the plan's method in between.

        Args:
            views: a prompt's images.
            plan: the plan.
            extras: the method's inputs besides images (`vtexport.pruning.extra`), by name.
        """
        import torch

        v = self.spec.vision
        tower = getattr(self.model.model, FAMILIES[self.spec.family].tower)
        layers = getattr(tower, "vision_model", tower).encoder.layers[: v.feature_layer]
        parts = [getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj")]
        with torch.inference_mode(), _outputs_of(parts) as seen:
            states = tower(torch.from_numpy(views.pixels), output_hidden_states=True).hidden_states
        attention = []
        if v.class_token:
            split = [seen[part].unflatten(2, (v.num_heads, v.head_size)).transpose(1, 2) for part in parts]
            attention = [TowerLayer(q[:, :, :1], k) for q, k in zip(split[::2], split[1::2], strict=True)]
        project = self.model.model.multi_modal_projector
        state = TowerState(states[v.feature_layer], attention, v.head_size**-0.5, v.grid, project)
        if plan.methods.vision.companion:
            ids = torch.from_numpy((extras or {})["question_ids"])[None]
            state = replace(state, relevance=self._relevance(state.patches, ids))
        rows = None
        if views.rows is not None:
            sequence, row_start = (torch.from_numpy(a)[None] for a in (views.rows.sequence, views.rows.row_start))
            rows = RowOrder(sequence, row_start, self.model.model.image_newline, self.spec.views.images)
        constants = {k: torch.from_numpy(a) for k, a in plan.methods.vision.constants(plan, v.grid).items()}
        with torch.inference_mode():
            pruned = prune(plan, state, constants, rows)
            spread = float(state.spread()[0]) if plan.views == 1 and v.class_token else None
        length = self._length(pruned, plan, views)
        kept = None if pruned.index is None else pruned.index.numpy()[:, : sum(length)]
        score = None if pruned.score is None else pruned.score.numpy()
        return ReferenceVision(pruned.tokens, kept, score, length, spread)

    def _length(self, pruned: Pruned, plan: PruningPlan, views: Views) -> tuple[int, ...]:
        if pruned.length is not None:
            return tuple(map(int, pruned.length[0]))
        if views.rows is not None:
            return tuple(map(int, views.rows.length))
        images = self.spec.views.images
        return (plan.vision_tokens // images,) * images

    def _relevance(self, patches: Any, ids: Any) -> Any:
        """Cosine similarity [B, V] of every patch with the question, in the space that CLIP's towers share."""
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
        extras: Mapping[str, Array] | None = None,
        length: tuple[int, ...] | None = None,
    ) -> ReferenceAnswer:
        """Run the decoder once on a prompt, its images as `visual`, and `new_tokens` after it.

        The result equals decoding token by token: attention is causal, and pruning looks at nothing after the prompt.

        Args:
            prompt: the prompt.
            visual: [1, K, C], projected visual tokens.
            new_tokens: tokens after the prompt.
            plan: the plan whose decoder stages prune.
            forced: by stage, indices to keep instead of those of highest score.
            extras: the method's inputs besides the prompt (`vtexport.pruning.extra`), by name.
            length: visual tokens of each image; None for a single image with all K.
        """
        import torch

        method = plan.methods.decoder
        with torch.inference_mode():
            rows, text, image = self._embed(prompt, visual, new_tokens, length)
            raters = None if method is None else method.rating_rows(image, text, rows.layout)
            kept: dict[str, Array] = {}
            score: dict[str, Array] = {}
            for number in range(self.spec.decoder.num_layers):
                hidden, attention = self.layer(number, rows)
                rows = DecoderState(hidden, rows.positions, rows.layout)
                stage = plan.decoder_stages.get(number)
                if stage is None:
                    continue
                assert method is not None, "a plan with decoder stages has a decoder-stage method"
                given = None if forced is None or stage.where not in forced else torch.from_numpy(forced[stage.where])
                rate = partial(self._score, method, number, rows, raters, attention, extras or {})
                dropped = drop(plan, method.counts(stage), rows, rate, None if given is None else given[None])
                rows = dropped.sequence
                if dropped.index is not None and dropped.score is not None:
                    index = dropped.index[0].numpy()
                    kept[stage.where], score[stage.where] = index[index >= 0], dropped.score[0].numpy()
            places = rows.layout.last_place()[:, None] + torch.arange(1 + len(new_tokens))
            last = rows.layout.rows_of(rows.hidden, places)
            logits = self.model.lm_head(self.model.model.language_model.norm(last))[0].float().numpy()
        return ReferenceAnswer(logits, kept, score)

    def rater_attention(self, prompt: Prompt, visual: Any, length: tuple[int, ...]) -> Iterator[Any]:
        """For each layer of the dense decoder, the head-mean attention [R, V] of SparseVLM's text raters to the images.

        Args:
            prompt: the prompt.
            visual: [1, V, C], projected visual tokens.
            length: visual tokens of each image.
        """
        import torch

        from vtexport.pruning.plain import attention_rows
        from vtexport.pruning.raters import text_raters

        with torch.inference_mode():
            rows, text, image = self._embed(prompt, visual, (), length)
            raters = text_raters(image, text, rows.layout.after_image(), rows.layout.present())
            places = rows.layout.text_places()[raters][None]
            for number in range(self.spec.decoder.num_layers):
                hidden, rotated = self.layer(number, rows)
                size = self.spec.decoder.head_size
                query = rows.layout.rows_of(rotated.query, places).unflatten(2, (-1, size)).transpose(1, 2)
                key = rotated.key.unflatten(2, (-1, size)).transpose(1, 2)
                attention = attention_rows(query, key, places, size**-0.5).mean(dim=1)
                yield rows.layout.visual_of(attention.transpose(1, 2))[0, : sum(length)].T
                rows = DecoderState(hidden, rows.positions, rows.layout)

    def layer(self, number: int, rows: DecoderState) -> tuple[Any, LayerAttention]:
        """Run decoder layer `number` on rows without padding; return its output [B, S, C] and its attention."""
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

    def _embed(
        self, prompt: Prompt, visual: Any, new_tokens: Sequence[int], length: tuple[int, ...] | None
    ) -> tuple[DecoderState, Any, Any]:
        """The decoder's input rows, and the text and visual embeddings by themselves."""
        import torch

        text = self.model.get_input_embeddings()(torch.tensor([[*prompt.token_ids, *new_tokens]]))
        image, words = torch.as_tensor(visual), torch.tensor([len(prompt.token_ids)])
        counts = None if length in (None, (image.shape[1],)) else torch.tensor([length])
        layout = Layout(torch.tensor([prompt.image_positions]), words, text.shape[1], image.shape[1], counts)
        return DecoderState(layout.bare().with_visual(text, image, layout), layout.places(), layout), text, image

    def _rotated(self, query: Any, key: Any, rope: tuple[Any, Any]) -> LayerAttention:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        size = self.spec.decoder.head_size
        split = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (query, key))
        return LayerAttention(*(x.transpose(1, 2).flatten(2) for x in apply_rotary_pos_emb(*split, *rope)))

    def _score(
        self,
        method: DecoderMethod,
        number: int,
        rows: DecoderState,
        raters: Any,
        attention: LayerAttention,
        extras: Mapping[str, Array],
    ) -> Any:
        """Scores [1, V] at the stage after layer `number`."""
        import torch

        given = method.given_score({name: torch.from_numpy(array)[None] for name, array in extras.items()})
        if given is not None:
            return given
        return rated(method, self._attention(method, number, rows, raters, attention), rows.layout, raters)

    def _attention(
        self, method: DecoderMethod, number: int, rows: DecoderState, raters: Any, attention: LayerAttention
    ) -> Attention:
        """The attention that rates tokens at the stage after layer `number`."""
        d, model = self.spec.decoder, self.model.model.language_model
        rating = attention
        rope = model.rotary_emb(rows.hidden, position_ids=rows.positions)
        if method.attention_of == "next":
            following = model.layers[number + 1]
            x = following.input_layernorm(rows.hidden)
            rating = self._rotated(following.self_attn.q_proj(x), following.self_attn.k_proj(x), rope)
        computed, places = rows_that_rate(rows.layout, raters)
        query = rows.layout.rows_of(rating.query, computed)
        scale = d.head_size**-0.5
        return Attention(query, rating.key, d.num_heads, d.num_kv_heads, scale, places, rows.positions, self._cosines())

    def _cosines(self) -> Any:
        from vtexport.models.rope import rope_tables

        return rope_tables(self.spec)[0]


@contextmanager
def _outputs_of(modules: Sequence[Any]):  # type: ignore[no-untyped-def]
    """The outputs of `modules` while the context is open, by module."""
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
