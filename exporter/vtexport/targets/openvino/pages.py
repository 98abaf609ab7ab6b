"""KV caches in blocks of arrays that all batches share: the paged attention of OpenVINO's CPU plugin.

Every layer has an array of keys and one of values, [blocks, G, block, D]. A row's tokens fill blocks in the order of its
table, and a step names each row's table and length. So no mask hides padding, no step copies a cache, and a prompt's
attention takes a quarter of the time that it takes with `vtexport.targets.openvino.states`. Layers between two stages
have caches of equal length, and therefore share tables.

Paged attention is how OpenVINO GenAI runs language models, but its op has no public constructor: `SUPPORTED` says whether
this version of OpenVINO has it in a form that is known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import op
from openvino import opset13 as ops

from vtexport.arrays import Array
from vtexport.targets.openvino.caches import BatchCache, Caches
from vtexport.targets.openvino.parts import Inputs, constant, extent, port, width

#: the inputs behind the twelfth, max_context_len, in the order of the op; as (dtype, shape) of a constant of zeros.
#: They stand for score aggregation, rotation of evicted keys, sparse attention, attention sinks, adaptive eviction, and
#: bidirectional attention to images, of which there is none here.
_UNUSED: tuple[tuple[Any, tuple[int, ...]], ...] = (
    (np.int32, (0,)),
    (np.int32, (0,)),
    (np.int32, (0,)),
    (np.float32, (0,)),
    (np.float32, (0,)),
    (np.int32, ()),
    (np.int32, ()),
    (np.float32, (0, 0, 0, 0)),
    (np.int32, ()),
    (np.int32, (0,)),
    (np.int32, (0,)),
    (np.int32, (0,)),
    (np.int32, (0,)),
    (np.uint8, (0,)),
    (np.int32, (0,)),
)


def _supported() -> bool:
    """Whether the op can be made here, for a layer of one head of two channels."""
    try:
        rows = [ops.parameter(ov.PartialShape([-1, 2]), ov.Type.f32) for _ in range(3)]
        cache = [ops.parameter(ov.PartialShape([-1, -1, -1, -1]), ov.Type.dynamic) for _ in range(2)]
        tables = [ops.parameter(ov.PartialShape([-1]), ov.Type.i32) for _ in range(4)]
        _paged_attention([*rows, *cache, *tables], ops.parameter(ov.PartialShape([]), ov.Type.i32), 1.0, 1)
    except (AttributeError, RuntimeError, TypeError):  # a version without the op, or with other inputs
        return False
    return True


def _paged_attention(inputs: Sequence[Any], longest: Any, scale: float, groups: int) -> Any:
    """The op.

    Args:
        inputs: query, key, value, key_cache, value_cache, past_lens, subsequence_begins, block_indices, and where these
            begin.
        longest: max_context_len.
        scale: factor on query · key.
        groups: heads of keys and values.
    """
    window, slopes = constant(0, np.int32), ops.constant(np.zeros(0, np.float32))
    unused = [ops.constant(np.zeros(shape, kind)) for kind, shape in _UNUSED]
    nodes = [*inputs, ops.constant(np.array(scale, np.float32)), window, slopes, longest, *unused]
    made = op._PagedAttentionExtension([port(node) for node in nodes])
    for part, rows in (("k", inputs[1]), ("v", inputs[2])):
        made.get_rt_info()[f"num_{part}_heads"] = groups
        made.get_rt_info()[f"{part}_head_size"] = width(rows) // groups
    return made.output(0)


SUPPORTED = _supported()


@dataclass(frozen=True)
class _Group:
    """What layers of equal extent share: the inputs of the op behind the caches, and the longest context, a scalar."""

    tables: Sequence[Any]
    longest: Any


class Paged:
    """The caches of a graph under conversion.

    The model gets inputs per layer i, `key_cache.i` and `value_cache.i`, whose dtype and block the plugin sets; and per
    group of layers, named after its first, `blocks.i` int32, the tables of all rows one behind the other, and `begins.i`
    [B + 1] int32, where each begins.

    Attributes:
        sinks: none, as attention itself writes into its blocks.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.sinks: list[Any] = []
        self._groups: dict[str, _Group] = {}

    def attend(self, context: Any) -> list[Any]:
        """Convert a `CachedAttention` node."""
        query, key, value, length = (context.get_input(number) for number in range(4))
        layer, scale, groups, rows = (context.get_attribute(name) for name in ("layer", "scale", "kv_heads", "rows"))
        if rows not in self._groups:
            self._groups[rows] = self._group(layer, query, length)
        group = self._groups[rows]
        caches = [self._inputs.add(f"{part}_cache.{layer}", [-1] * 4, ov.Type.dynamic) for part in ("key", "value")]
        flat = [ops.reshape(part, constant([-1, width(part)]), False) for part in (query, key, value)]
        mixed = _paged_attention([*flat, *caches, *group.tables], group.longest, scale, groups)
        merged = ops.reshape(mixed, ops.shape_of(query), False)
        # The second output is of graphs with rankings, which are not converted to this.
        return [merged.output(0), key]

    def _group(self, layer: int, query: Any, length: Any) -> _Group:
        blocks, begins = (self._inputs.add(f"{name}.{layer}", [-1], ov.Type.i32) for name in ("blocks", "begins"))
        past = ops.convert(length, ov.Type.i32)
        zero, one, new = constant(0), constant(1), extent(query, 1)
        rows = ops.squeeze(extent(query, 0), zero)
        sequences = ops.multiply(ops.range(zero, ops.add(rows, one), one, "i64"), new)
        longest = ops.add(ops.reduce_max(past, zero), ops.convert(ops.squeeze(new, zero), ov.Type.i32))
        return _Group([past, ops.convert(sequences, ov.Type.i32), blocks, begins], longest)


class _Store:
    """The arrays of a group of layers, and which of their blocks are free.

    Args:
        request: the request whose inputs they are.
        ports: these inputs.
    """

    def __init__(self, request: Any, ports: Sequence[Any]) -> None:
        self._request, self._ports = request, ports
        self.block = int(ports[0].get_partial_shape()[2].get_length())
        self._arrays = {entry.get_any_name(): self._zeros(entry, 0) for entry in ports}
        #: bytes of a block in all these layers
        self.block_bytes = sum(int(self._zeros(entry, 1).nbytes) for entry in ports)
        self._free: list[int] = []
        # Batches end whenever Python finds it out, maybe in the middle of `take`.
        self._returned: list[Array] = []
        self._total = 0

    def take(self, rows: int, tokens: int) -> list[Array]:
        """Blocks for `tokens` tokens of each of `rows` rows; a table [blocks] int32 per row."""
        each = -(-tokens // self.block)
        while self._returned:
            self._free += self._returned.pop().tolist()
        if len(self._free) == self._total > 2 * rows * each:
            # Nothing is cached, and more memory held than this batch needs.
            self._free, self._total = [], 0
        if rows * each > len(self._free):
            self._grow(rows * each - len(self._free))
        self._free.sort()
        taken, self._free = self._free[: rows * each], self._free[rows * each :]
        return np.split(np.array(taken, dtype=np.int32), rows)

    def give(self, tables: Sequence[Array]) -> None:
        """Blocks that no row needs any more."""
        self._returned += tables

    def _grow(self, more: int) -> None:
        used = self._total
        self._free += range(used, used + more)
        self._total += more
        # One array after the other, so that the caches are never there twice. Zeros, because what is behind a row's last
        # token is multiplied by zero, which not every pattern of bits survives.
        for entry in self._ports:
            name, array = entry.get_any_name(), self._zeros(entry, self._total)
            array[:used] = self._arrays[name][:used]
            self._arrays[name] = array
            self._request.set_tensor(name, ov.Tensor(array, ov.Shape(array.shape), entry.get_element_type()))

    def _zeros(self, entry: Any, blocks: int) -> Array:
        kind, extents = entry.get_element_type(), [size.get_length() for size in list(entry.get_partial_shape())[1:]]
        # NumPy has no bf16; its bytes are all that counts here.
        return np.zeros((blocks, *extents), np.uint16 if kind == ov.Type.bf16 else kind.to_dtype())


@dataclass(kw_only=True, eq=False)
class PagedCache(BatchCache):
    """A batch's KV cache: blocks of the stores.

    Attributes:
        stores: the arrays of each group of layers, by its first layer.
        tables: each row's blocks [blocks] int32, by the same.
    """

    stores: Mapping[int, _Store]
    tables: dict[int, list[Array]]

    @property
    def nbytes(self) -> int:
        return sum(
            store.block_bytes * sum(len(table) for table in self.tables[first]) for first, store in self.stores.items()
        )

    def feeds(self, length: Array) -> Mapping[str, Array]:
        given: dict[str, Array] = {}
        for first, tables in self.tables.items():
            given[f"blocks.{first}"] = np.concatenate(tables)
            given[f"begins.{first}"] = np.cumsum([0, *map(len, tables)], dtype=np.int32)
        return given

    def retain(self, rows: Array) -> None:
        staying = set(rows.tolist())
        for first, tables in self.tables.items():
            self.stores[first].give([table for row, table in enumerate(tables) if row not in staying])
            self.tables[first] = [tables[row] for row in rows]

    def join(self, other: BatchCache) -> bool:
        assert isinstance(other, PagedCache)
        for first, tables in self.tables.items():
            tables += other.tables[first]
            # The blocks are this batch's now, and the other one does not give them back.
            other.tables[first] = []
        return True


class Pages(Caches):
    """The caches of a compiled model; all batches run in the same inference request."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        ports = {entry.get_any_name(): entry for entry in compiled.inputs}
        layers = sum(name.startswith("key_cache.") for name in ports)
        firsts = sorted(int(name.removeprefix("blocks.")) for name in ports if name.startswith("blocks."))
        self._stores = {
            first: _Store(
                self._request,
                [ports[f"{part}_cache.{layer}"] for layer in range(first, end) for part in ("key", "value")],
            )
            for first, end in zip(firsts, [*firsts[1:], layers], strict=True)
        }

    def start(self, rows: int, places: Sequence[int]) -> PagedCache:
        tables = {first: store.take(rows, places[first]) for first, store in self._stores.items()}
        cache = PagedCache(request=self._request, stores=self._stores, tables=tables)
        weakref.finalize(cache, _give_back, self._stores, tables)
        return cache


def _give_back(stores: Mapping[int, _Store], tables: Mapping[int, list[Array]]) -> None:
    for first, store in stores.items():
        store.give(tables[first])
