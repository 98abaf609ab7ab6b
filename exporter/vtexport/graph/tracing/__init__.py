"""Runs a PyTorch module on stand-ins for tensors and writes down, as an ONNX graph, what it computes.

`Recorder` intercepts every torch function that the module calls, and looks it up in a table of conversions that the
modules beside it fill. Nodes are chosen so that every runtime supports them: ONNX Runtime's CPU has no `Where` on bool,
and TensorRT wants reduction axes and most other parameters constant.
"""

from vtexport.graph.tracing import arithmetic, layers, own_ops, selection, shapes  # noqa: F401 - they fill the table
from vtexport.graph.tracing.extent import Extent
from vtexport.graph.tracing.recorder import Kind, Recorder, Traced

__all__ = ["Extent", "Kind", "Recorder", "Traced"]
