"""Where an ONNX file's weights may lie: in files beside it, whichever version of a runtime reads them."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vtexport.errors import BundleError, first_line

if TYPE_CHECKING:
    import onnx

#: bytes of a graph without its weights; that of a model of 80 layers has about three million
GRAPH_BYTES = 256 << 20


def check_graph(path: Path) -> None:
    """Refuse an ONNX file that is none, or whose weights lie anywhere but in regular files beside it.

    Raises:
        BundleError: it is damaged, or points out of its folder.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.stat().st_size > GRAPH_BYTES:
            raise BundleError(f"{path} is larger than any graph without weights; build the bundle again")
        model = onnx.load_model_from_string(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path} cannot be read ({first_line(error)}); build the bundle again") from error
    for location in {location for tensor in _tensors(model) for location in _locations(tensor)}:
        beside = path.parent / location
        # `Path.is_file` raises for a name that is longer than file systems take.
        if Path(location).name != location or not os.path.isfile(beside) or beside.is_symlink():
            raise BundleError(f"{path} has weights in {location!r}, which is no file beside it; build the bundle again")


def _locations(tensor: onnx.TensorProto) -> Iterator[str]:
    """The files that `tensor` names, whether or not it says that its data are external."""
    return (entry.value for entry in tensor.external_data if entry.key == "location")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model: of its graph, of the graphs and the constants inside nodes, of its functions."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes += graph.node
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            continue
        for attribute in nodes.pop().attribute:
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs
            yield from [attribute.t, *attribute.tensors]
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                yield from (sparse.values, sparse.indices)
