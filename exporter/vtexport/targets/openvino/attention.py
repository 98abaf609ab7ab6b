"""Attention to a cache that is OpenVINO's own state: two variables per layer, each of its layer's length.

New keys and values are appended on the sequence axis, in the form that the CPU plugin fuses with attention
(ReadValue, Gather by `beam_idx`, Concat, attention and Assign), so that a step copies no cache. Prompts are padded on the
right, so a batch of unequal prompts has padding inside its caches, and every layer hides it by a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from vtexport.targets.openvino.parts import Heads, attention, constant, extent, port, shared, width


@dataclass(frozen=True)
class _Seen:
    """What new rows see of a cache and of each other.

    Attributes:
        begins: where the padding in the cache begins, [B, 1].
        padding: its length, [B, 1].
        place: the number of each place, [N].
        mask: [B, 1, S, N], added to the products of queries and keys: 0 for what is seen, else minus infinity.
    """

    begins: Any
    padding: Any
    place: Any
    mask: Any


class Caches:
    """The variables of a graph under conversion, and what its layers share."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        #: the nodes that write the variables
        self.sinks: list[Any] = []
        self._seen: dict[str, _Seen] = {}

    def attend(self, context: Any) -> list[Any]:
        """Convert a `StatefulAttention` node."""
        query, key, value, length, beam, prompt = (context.get_input(number) for number in range(6))
        num_heads, groups = context.get_attribute("num_heads"), context.get_attribute("kv_heads")
        layer, scale, rows = (context.get_attribute(name) for name in ("layer", "scale", "rows"))
        pasts, kept = [], []
        for part, new in (("key", key), ("value", value)):
            heads, name = self._heads.split(new, groups), f"{part}.{layer}"
            pasts.append(_past(name, heads, groups, beam))
            kept.append(ops.concat([ops.gather(pasts[-1], beam, constant(0)), heads], 2))
            self.sinks.append(ops.assign(kept[-1], name))
        if rows not in self._seen:
            begins = ops.unsqueeze(ops.gather(prompt, constant(layer), constant(0)), constant(1))
            self._seen[rows] = _seen(extent(pasts[0], 2), extent(query, 1), length, begins, query)
        seen = self._seen[rows]
        keys, values = (shared(part, groups, num_heads) for part in kept)
        mixed = attention(self._heads.split(query, num_heads), keys, values, scale, seen.mask)
        ranked = _without_padding(kept[0], seen) if context.get_attribute("ranks") else kept[0]
        return [self._heads.merge(mixed).output(0), ranked.output(0)]


def _past(name: str, rows: Any, groups: int, beam: Any) -> Any:
    """A variable for rows [B, G, S, D], which is [B, G, 0, D] before the first call."""
    kind, size = port(rows).get_element_type(), width(rows)
    empty = ops.concat([extent(beam, 0), constant([groups, 0, size])], 0)
    nothing = ops.broadcast(ops.constant(np.array(0, np.float32), dtype=kind), empty)
    return ops.read_value(nothing, name, kind, ov.PartialShape([-1, groups, -1, size]))


def _seen(before: Any, new: Any, length: Any, begins: Any, like: Any) -> _Seen:
    """What rows see; the same for all layers between two stages.

    Args:
        before: places that the cache has, padding included, [1].
        new: rows that join it, [1].
        length: tokens in the cache, [B].
        begins: tokens of the prompt in it, [B, 1].
        like: queries, whose dtype the mask gets.
    """
    zero, one = constant(0), constant(1)
    total = ops.squeeze(ops.add(before, new), zero)
    place = ops.range(zero, total, one, "i64")
    own = ops.range(ops.squeeze(before, zero), total, one, "i64")
    padding = ops.unsqueeze(ops.subtract(before, length), one)
    token = ops.logical_or(ops.less(place, begins), ops.greater_equal(place, ops.add(begins, padding)))
    causal = ops.less_equal(place, ops.unsqueeze(own, one))
    seen = ops.logical_and(ops.unsqueeze(token, constant([1, 2])), causal)
    # A bool mask would be turned into this by every layer anew, number by number on one core: twice the time of the
    # attention itself.
    nothing, least = (ops.constant(np.array(value, np.float32)) for value in (0, -np.inf))
    mask = ops.convert_like(ops.select(seen, nothing, least), like)
    return _Seen(begins, padding, place, mask)


def _without_padding(keys: Any, seen: _Seen) -> Any:
    """Keys [B, G, N, D] with the padding behind all tokens, as `vtexport.graph.nn_ops.cached_attention` has them."""
    behind = ops.convert(ops.greater_equal(seen.place, seen.begins), "i64")
    last = ops.subtract(extent(keys, 2), constant([1]))
    place = ops.minimum(ops.add(seen.place, ops.multiply(behind, seen.padding)), last)
    return ops.gather(keys, place, constant(2), 1)
