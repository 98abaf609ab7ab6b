"""KV caches as OpenVINO's own state: two variables per layer, each of its layer's length.

Every device has them, and they give rankings; on the CPU, `vtexport.targets.openvino.pages` is faster. New keys and
values are appended on the sequence axis, in the form that the CPU plugin fuses with attention (ReadValue, Gather by
`beam_idx`, Concat, attention and Assign), so that a step copies no cache. Prompts are padded on the right, so a batch of
unequal prompts has padding inside its caches, and every layer hides it by a mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from vtexport.arrays import Array
from vtexport.targets.openvino.caches import BatchCache, Caches
from vtexport.targets.openvino.parts import Heads, Inputs, attention, constant, extent, port, shared, width

BEAM, PROMPT = "beam_idx", "prompt"


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


class Variables:
    """The caches of a graph under conversion, and what its layers share.

    The model gets two more inputs: `beam_idx` [B] int32, by which a plugin recognises such a state, the row of the state
    that each row of the batch goes on from; and `prompt` [N, B] int64, the tokens of each row's prompt in each layer,
    behind which the padding begins; zeros as long as there is no cache.

    Attributes:
        sinks: the nodes that write the variables.
    """

    def __init__(self, heads: Heads, inputs: Inputs) -> None:
        self._heads, self._inputs = heads, inputs
        self.sinks: list[Any] = []
        self._shared: tuple[Any, Any] | None = None
        self._seen: dict[str, _Seen] = {}

    def attend(self, context: Any) -> list[Any]:
        """Convert a `CachedAttention` node."""
        query, key, value, length = (context.get_input(number) for number in range(4))
        if self._shared is None:
            add = self._inputs.add
            self._shared = add(BEAM, [-1], ov.Type.i32), add(PROMPT, [-1, -1], ov.Type.i64)
        beam, prompt = self._shared
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


@dataclass(kw_only=True, eq=False)
class StateCache(BatchCache):
    """A batch's KV cache: the state of an inference request of its own.

    Attributes:
        beams: [B] int64, the row of the state that each row goes on from with the next call.
        prompt: [N, B] int64, tokens of each row's prompt in each layer; None before the first decode step.
        filled: whether a call has filled the state.
    """

    beams: Array
    prompt: Array | None = None
    filled: bool = False

    @property
    def nbytes(self) -> int:
        return sum(int(state.state.byte_size) for state in self.request.query_state())

    def feeds(self, length: Array) -> Mapping[str, Array]:
        if self.filled and self.prompt is None:
            self.prompt = np.array(length)
        # Before the first call nothing is cached, so there is no padding to hide, wherever it may begin.
        given = {BEAM: self.beams.astype(np.int32), PROMPT: length if self.prompt is None else self.prompt}
        self.filled, self.beams = True, np.arange(len(self.beams))
        return given

    def retain(self, rows: Array) -> None:
        # The next step takes these rows out of the state, and its memory shrinks then.
        self.beams = self.beams[rows]
        self.prompt = None if self.prompt is None else self.prompt[:, rows]

    def join(self, other: BatchCache) -> bool:
        # Two requests have a state each.
        return False


class States(Caches):
    """The caches of a compiled model: each batch has an inference request of its own."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        # Requests whose batches are over. Their states keep the memory, for which the system would otherwise be asked
        # anew in the first decode step of every batch.
        self._free: list[Any] = []

    def start(self, rows: int, places: Sequence[int]) -> StateCache:
        if self._free:
            request = self._free.pop()
            request.reset_state()
        else:
            request = self._compiled.create_infer_request()
        cache = StateCache(request=request, beams=np.arange(rows))
        weakref.finalize(cache, self._free.append, request)
        return cache
