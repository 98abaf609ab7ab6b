"""The ONNX operator domains of vtexport's own ops, and the opset of the rest."""

from __future__ import annotations

#: the public domain of the pruning ops (`vtexport.pruning.ops`)
PRUNING = "vtexport"
#: the domain of transformer parts that runtimes have kernels for (`vtexport.graph.nn_ops`)
NN = "vtexport.nn"
DOMAIN_VERSION = 2
#: the opset of the standard ops
OPSET = 18
