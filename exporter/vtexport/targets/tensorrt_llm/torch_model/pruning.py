"""One stage inside TensorRT-LLM's decoder: scores, selection and recycling on its packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vtexport.graph import nn_ops
from vtexport.models.rope import tables
from vtexport.models.spec import DecoderSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import Attention, DecoderState, Dropped, drop, rated, rows_that_rate
from vtexport.targets.tensorrt_llm.torch_model.packing import Packed

#: gives the queries [T, H * D] and keys [T, G * D] of all packed rows before RoPE
QueriesAndKeys = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rope:
    """RoPE's inverse frequencies and the factor on its cosines and sines; see `vtexport.models.rope`."""

    frequencies: Sequence[float]
    scaling: float

    def tables(self, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, D / 2] in the dtype and on the device of `like`."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=like.device)
        cos, sin = tables(frequencies, self.scaling, positions)
        return cos.to(like.dtype), sin.to(like.dtype)


class Prefill:
    """The pruning of one step's contexts on their way through the decoder.

    Args:
        plan: the plan.
        decoder: the decoder's geometry.
        rope: its RoPE.
        packed: the contexts with images.
        embedded: [T, C], the decoder's input.
    """

    def __init__(self, plan: PruningPlan, decoder: DecoderSpec, rope: Rope, packed: Packed, embedded: Tensor) -> None:
        assert plan.methods.decoder is not None, "a plan with decoder stages has a decoder-stage method"
        self._plan, self._method, self._decoder, self._packed = plan, plan.methods.decoder, decoder, packed
        layout = packed.layout
        self._cos, self._sin = rope.tables(layout.text + layout.visual, embedded)
        # A layout without images would have no raters, and needs none.
        rows = packed.batch(embedded)
        text, visual = layout.rows_of(rows, layout.text_places()), layout.visual_of(rows)
        self._raters = self._method.rating_rows(visual, text, layout)

    def drop(
        self, layer: int, hidden: Tensor, positions: Tensor, heard: QueriesAndKeys, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Dropped]:
        """The stage after `layer`.

        Args:
            layer: the layer.
            hidden: [T, C], its output, the residual included.
            positions: [T], of all packed rows.
            heard: gives the queries and keys that rate.
            lengths: tokens of every row of the step after the stage.

        Returns:
            hidden [T', C] and positions [T'] after the stage, and what it did with the contexts.
        """
        state = self._packed.state(hidden)
        counts = self._method.counts(self._plan.decoder_stages[layer])
        dropped = drop(self._plan, counts, state, partial(self._score, state, heard))
        self._packed, source = self._packed.after(dropped.sequence, lengths)
        kept = torch.cat([hidden, dropped.sequence.hidden.flatten(0, 1)])[source]
        placed = torch.cat([positions, dropped.sequence.positions.flatten().to(positions.dtype)])[source]
        return kept, placed, dropped

    def _score(self, state: DecoderState, heard: QueriesAndKeys) -> Tensor:
        """Scores [B, V] of the contexts' visual tokens."""
        d, layout = self._decoder, state.layout
        computed, places = rows_that_rate(layout, self._raters)
        queries, keys = heard()
        query = layout.rows_of(self._packed.batch(queries), computed)
        query = self._rotated(query, state.positions.gather(1, computed), d.num_heads)
        key = self._rotated(self._packed.batch(keys), state.positions, d.num_kv_heads)
        scale = d.head_size**-0.5
        attention = Attention(query, key, d.num_heads, d.num_kv_heads, scale, places, state.positions, self._cos)
        return rated(self._method, attention, layout, self._raters)

    def _rotated(self, x: Tensor, positions: Tensor, heads: int) -> Tensor:
        return nn_ops.rotary(x, positions, self._cos, self._sin, heads)
