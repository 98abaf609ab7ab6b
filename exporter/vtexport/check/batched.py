"""The model as transformers runs it, in parts that take batches of prompts: tower, rows, one layer, scores, logits.

Nothing of `vtexport.graph` is used here, so that an error there cannot hide in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vtexport.arrays import Array
from vtexport.models.families import FAMILIES
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ModelSpec
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import Attention, DecoderMethod, DecoderState, rated, rows_that_rate
from vtexport.pruning.layout import Layout
from vtexport.pruning.vision import Pruned, RowOrder, TowerLayer, TowerState, prune


@dataclass(frozen=True)
class Looked:
    """What the tower made of the images of a batch of prompts, before any method: its state, and these images."""

    state: TowerState
    rows: RowOrder | None
    views: Sequence[Views]

    def spread(self) -> list[float]:
        """The spread of CLS's attention in patches, by prompt; only for prompts of one view, and a tower with CLS."""
        return [float(spread) for spread in self.state.spread()]


@dataclass(frozen=True)
class Seen:
    """The vision stage's result for a batch: visual tokens [B, K, C], index, score; and each prompt's lengths."""

    pruned: Pruned
    length: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Embedded:
    """The decoder's input for a batch: its rows, and the text [B, L, C] and images [B, K, C] that they hold."""

    rows: DecoderState
    text: Any
    image: Any


@dataclass(frozen=True)
class LayerAttention:
    """Rotated queries [B, S, H * D] and keys [B, S, G * D] of one decoder layer."""

    query: Any
    key: Any


class BatchedModel:
    """transformers' model of the checkpoint's family, in fp32 with eager attention.

    The prompts of a batch may have any lengths; rows are padded on the right, where no token of a prompt sees them.
    The model's weights are rounded by `rounding`, functions for the decoder's "layers" and for its "head".
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
        how: Any = {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True}
        how |= {"local_files_only": True, "trust_remote_code": False}
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, **how).eval()
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
            self.clip = CLIPModel.from_pretrained(clip, **how).eval()

    def look(self, views: Sequence[Views], plan: PruningPlan, extras: Mapping[str, Array] | None = None) -> Looked:
        """Run the vision tower on the images of a batch of prompts; `plan` and `extras` say what else to compute."""
        import torch

        v = self.spec.vision
        tower = getattr(self.model.model, FAMILIES[self.spec.family].tower)
        layers = getattr(tower, "vision_model", tower).encoder.layers[: v.feature_layer]
        parts = [getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj")]
        pixels = torch.cat([torch.from_numpy(of_prompt.pixels) for of_prompt in views])
        with torch.inference_mode(), _outputs_of(parts) as seen:
            states = tower(pixels, output_hidden_states=True).hidden_states
        attention = []
        if v.class_token:
            split = [seen[part].unflatten(2, (v.num_heads, v.head_size)).transpose(1, 2) for part in parts]
            attention = [TowerLayer(q[:, :, :1], k) for q, k in zip(split[::2], split[1::2], strict=True)]
        project = self.model.model.multi_modal_projector
        state = TowerState(states[v.feature_layer], attention, v.head_size**-0.5, v.grid, project)
        if plan.methods.vision.companion:
            ids = torch.from_numpy((extras or {})["question_ids"])[None]
            state = replace(state, relevance=self._relevance(state.patches, ids))
        by_rows = [of_prompt.rows for of_prompt in views if of_prompt.rows is not None]
        if not by_rows:
            return Looked(state, None, views)
        sequence, row_start = (
            torch.stack([torch.from_numpy(getattr(rows, name)) for rows in by_rows])
            for name in ("sequence", "row_start")
        )
        newline = self.model.model.image_newline
        return Looked(state, RowOrder(sequence, row_start, newline, self.spec.views.images), views)

    def see(self, looked: Looked, plan: PruningPlan) -> Seen:
        """Apply the vision stage of `plan`, and the projector, to what the tower made of a batch."""
        import torch

        constants = plan.methods.vision.constants(plan, self.spec.vision.grid)
        with torch.inference_mode():
            arrays = {name: torch.from_numpy(array) for name, array in constants.items()}
            pruned = prune(plan, looked.state, arrays, looked.rows)
        return Seen(pruned, tuple(self._length(pruned, plan, views, row) for row, views in enumerate(looked.views)))

    def _length(self, pruned: Pruned, plan: PruningPlan, views: Views, row: int) -> tuple[int, ...]:
        if pruned.length is not None:
            return tuple(map(int, pruned.length[row]))
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

    def raters(self, plan: PruningPlan, embedded: Embedded) -> Any:
        """The text tokens that rate for the decoder-stage method of `plan`, [B, L] bool, or None."""
        method = plan.methods.decoder
        return None if method is None else method.rating_rows(embedded.image, embedded.text, embedded.rows.layout)

    def logits(self, rows: DecoderState, new: int = 0) -> Any:
        """The logits [B, 1 + new, vocabulary] after each prompt and after each of `new` tokens that follow it."""
        import torch

        places = rows.layout.last_place()[:, None] + torch.arange(1 + new)
        last = rows.layout.rows_of(rows.hidden, places)
        return self.head(last)

    def head(self, hidden: Any) -> Any:
        """The logits [B, N, vocabulary] of the last layer's output [B, N, C]."""
        return self.model.lm_head(self.model.model.language_model.norm(hidden)).float()

    def embeddings(self, ids: Any) -> Any:
        """The embeddings [B, N, C] of text tokens `ids` [B, N]."""
        return self.model.get_input_embeddings()(ids)

    def layer(self, number: int, rows: DecoderState, mask: Any = None, cache: Any = None) -> tuple[Any, LayerAttention]:
        """Run decoder layer `number`; return its output [B, S, C] and its attention.

        Args:
            number: the layer.
            rows: its input.
            mask: what is added to the attention's logits; None for causal attention.
            cache: transformers' cache of keys and values, which the layer extends; None for none.
        """
        import torch

        layer = self.model.model.language_model.layers[number]
        if mask is None:
            mask = torch.full((rows.hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        rope = self.model.model.language_model.rotary_emb(rows.hidden, position_ids=rows.positions)
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj]
        with _outputs_of(parts) as seen:
            out = layer(
                rows.hidden,
                attention_mask=mask,
                position_ids=rows.positions,
                position_embeddings=rope,
                past_key_values=cache,
            )
        hidden = out[0] if isinstance(out, tuple) else out
        return hidden, self._rotated(seen[parts[0]], seen[parts[1]], rope)

    def embed(
        self,
        prompts: Sequence[Prompt],
        visual: Any,
        new_tokens: Sequence[Sequence[int]],
        length: Sequence[tuple[int, ...]] | None,
    ) -> Embedded:
        """The decoder's input for a batch.

        Args:
            prompts: B prompts.
            visual: [B, K, C], their projected visual tokens.
            new_tokens: for each prompt, tokens after it.
            length: for each prompt, visual tokens of each image; None for a single image with all K.
        """
        import torch

        # Room for as many new tokens behind the longest prompt, so that `logits` finds a place for each of every row.
        width = max(len(prompt.token_ids) for prompt in prompts) + max(map(len, new_tokens))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True)):
            ids[row, : len(prompt.token_ids) + len(new)] = torch.tensor([*prompt.token_ids, *new])
        text, image = self.embeddings(ids), torch.as_tensor(visual)
        words = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        same = length is None or all(of_prompt == (image.shape[1],) for of_prompt in length)
        counts = None if same else torch.tensor(length)
        places = torch.tensor([prompt.image_positions for prompt in prompts])
        layout = Layout(places, words, width, image.shape[1], counts)
        return Embedded(
            DecoderState(layout.bare().with_visual(text, image, layout), layout.places(), layout), text, image
        )

    def _rotated(self, query: Any, key: Any, rope: tuple[Any, Any]) -> LayerAttention:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        size = self.spec.decoder.head_size
        split = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (query, key))
        return LayerAttention(*(x.transpose(1, 2).flatten(2) for x in apply_rotary_pos_emb(*split, *rope)))

    def score(
        self,
        method: DecoderMethod | None,
        number: int,
        rows: DecoderState,
        raters: Any,
        attention: LayerAttention,
        extras: Mapping[str, Array],
    ) -> Any:
        """Scores [B, V] at the stage after layer `number`, whose output is `rows`."""
        import torch

        assert method is not None, "a plan with decoder stages has a decoder-stage method"
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
        return Attention(query, rating.key, d.num_heads, d.num_kv_heads, scale, places, rows.positions, self._cosines)

    @cached_property
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
