"""Triton's model configurations, `config.pbtxt`: protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vtexport.bundle.manifest import GraphEntry, PortEntry

#: ONNX type, as a manifest names it -> Triton's
_TYPES = {
    "float": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
#: the name of the extent that Triton's batching is about
_BATCH = "batch"


@dataclass(frozen=True)
class Port:
    """An input or output of a model: dims without the batch axis if the model has one; -1 for any extent.

    Attributes:
        scalar: whether the backend sees no axis where Triton, which has no scalars, sees dims [1].
    """

    name: str
    kind: str
    dims: Sequence[int] = (1,)
    optional: bool = False
    scalar: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration.

    Attributes:
        max_batch: rows per batch at most; 0 if the model's ports have no batch axis in front.
        instances: KIND_CPU for one instance, KIND_GPU for one on every GPU.
        more: further lines.
    """

    name: str
    backend: str
    max_batch: int
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    instances: str
    more: Sequence[str] = ()

    def text(self) -> str:
        """The content of config.pbtxt."""
        lines = [
            f"name: {json.dumps(self.name)}",
            f"backend: {json.dumps(self.backend)}",
            f"max_batch_size: {self.max_batch}",
            *(_port("input", port) for port in self.inputs),
            *(_port("output", port) for port in self.outputs),
            f"instance_group [ {{ kind: {self.instances} count: 1 }} ]",
            *self.more,
        ]
        return "\n".join(lines) + "\n"


def graph_ports(graph: GraphEntry) -> tuple[bool, list[Port], list[Port]]:
    """The ports of a graph as Triton has them.

    Returns:
        whether every port has the batch in front, so that Triton may put requests together; inputs; outputs.
    """
    batched = all(port.shape[:1] == [_BATCH] for port in [*graph.inputs, *graph.outputs])
    return batched, [_of_graph(port, batched) for port in graph.inputs], [_of_graph(p, batched) for p in graph.outputs]


def _of_graph(port: PortEntry, batched: bool) -> Port:
    dims = [extent if isinstance(extent, int) else -1 for extent in port.shape[int(batched) :]]
    return Port(port.name, _TYPES[port.dtype], dims or [1], scalar=not dims)


def _port(field: str, port: Port) -> str:
    dims = ", ".join(map(str, port.dims))
    optional, scalar = " optional: true" * port.optional, " reshape { shape: [ ] }" * port.scalar
    return f"{field} [ {{ name: {json.dumps(port.name)} data_type: {port.kind} dims: [ {dims} ]{scalar}{optional} }} ]"
