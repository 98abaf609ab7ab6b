"""Weight-only quantisation of the decoder's linear layers, in whatever form a runtime has kernels for.

The vision tower and embeddings stay as they are, so that a vision stage keeps the same tokens. A runtime may
round the activations that such a weight multiplies to 8 bits on the fly, if its fast kernels want them so.
Weights are quantised one by one as they are written.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import onnx_ir as ir

from vtexport.arrays import Array
from vtexport.graph.weights import Lazy, add_initialiser

_LAYER = re.compile(r"decoder\.layers\.\d+\..*\.weight")
#: the head's weight, which is that of the embeddings where the two are tied
_HEAD = ("head.weight", "decoder.embed_tokens.weight")


class Scheme(ABC):
    """A way to hold a weight [N, K] in fewer bits: the tensors it becomes, and the nodes that multiply by them."""

    #: the names of those tensors
    parts: ClassVar[tuple[str, ...]]
    #: whether the runtime rounds the activations that such a weight multiplies to 8 bits
    rounds_activations: ClassVar[bool] = False
    #: whether it takes weights in bf16, as `ml_dtypes` has them
    takes_bf16: ClassVar[bool] = False

    @property
    def head(self) -> Scheme | None:
        """How the head is held, whose errors go into logits directly; None for as it is."""
        return None

    @abstractmethod
    def tensors(self, rows: int, columns: int, dtype: ir.DataType) -> Sequence[tuple[ir.DataType, tuple[int, ...]]]:
        """Types and shapes of `parts`, for a weight [rows, columns] of that dtype."""

    @abstractmethod
    def encode(self, weight: Array) -> Sequence[Array]:
        """`parts` of a weight [N, K], fp32 or fp16, as they lie in a file."""

    @abstractmethod
    def rounded(self, weight: Array) -> Array:
        """The numbers that the runtime multiplies by, [N, K] in the weight's dtype."""

    @abstractmethod
    def product(self, x: ir.Value, parts: Sequence[ir.Value], rows: int, columns: int) -> Sequence[ir.Node]:
        """Nodes that yield x · weightᵀ, the last one as its output."""

    def opset(self) -> Mapping[str, int]:
        """Domains and versions that `product` needs."""
        return {}


def quantize(models: Sequence[ir.Model], scheme: Scheme) -> dict[str, Lazy]:
    """Replace the products with the decoder's weights by those of `scheme`, and with the head's by those of its head.

    Returns:
        for each new initialiser, by name, how it is made from the weight that it replaces.
    """
    sources: dict[str, Lazy] = {}
    layers, head = _Encoder(scheme), None if scheme.head is None else _Encoder(scheme.head)
    for model in models:
        for node in list(model.graph):
            name = _weight_of(node)
            encoder = layers if name is not None and _LAYER.fullmatch(name) else head if name in _HEAD else None
            if name is not None and encoder is not None:
                sources |= _replace(model.graph, node, name, encoder)
        for domain, version in scheme.opset().items():
            scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
            for scope in scopes:
                if domain in scope.opset_imports or scope is model.graph:
                    scope.opset_imports[domain] = version
    return sources


class _Encoder:
    """Encodes a weight once for the tensors that it becomes, which are written one after the other."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._last: tuple[Array, Sequence[Array]] | None = None

    def __call__(self, number: int, weight: Array) -> Array:
        if self._last is None or self._last[0] is not weight:
            self._last = weight, self.scheme.encode(weight)
        return self._last[1][number]


def _weight_of(node: ir.Node) -> str | None:
    """The name of the weight in a product x · weightᵀ; None for other nodes."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    return transpose.inputs[0].name


def _replace(graph: ir.Graph, node: ir.Node, name: str, encoder: _Encoder) -> dict[str, Lazy]:
    x, transposed = node.inputs
    assert x is not None, "a product has two factors"
    assert transposed is not None, "a product has two factors"
    transpose = transposed.producer()
    assert transpose is not None, "a weight comes transposed"
    weight = transpose.inputs[0]
    assert weight is not None, "what is transposed is a weight"
    assert weight.shape is not None, "weights have shapes"
    assert weight.dtype is not None, "weights have dtypes"
    rows, columns = (int(extent) for extent in weight.shape.numpy())
    scheme, parts, sources = encoder.scheme, [], {}
    for number, (element_type, extents) in enumerate(scheme.tensors(rows, columns, weight.dtype)):
        part = f"{name}.{scheme.parts[number]}"
        value = ir.Value(name=part, shape=ir.Shape(extents), type=ir.TensorType(element_type))
        add_initialiser(graph, value)
        parts.append(value)
        sources[part] = Lazy(name, weight.dtype, partial(encoder, number))
    nodes = scheme.product(x, parts, rows, columns)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.insert_before(node, nodes)
    graph.remove(node, safe=True)
    if not transposed.uses():
        graph.remove(transpose, safe=True)
    if not weight.uses():
        del graph.initializers[name]
    return sources


def block_quantizer(**config: Any) -> Any:
    """ONNX Runtime's block-wise weight quantizer; `config` is for its `DefaultWeightOnlyQuantConfig`."""
    import logging

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    # Importing it changes logging for the whole process, which is undone here.
    root.handlers[:], root.level = handlers, level
    return DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(**config))
