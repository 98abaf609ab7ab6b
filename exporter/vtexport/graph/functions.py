"""ONNX function bodies of the domains `vtexport` and `vtexport.nn`, in standard ops of opset 18.

Tracing leaves one node for each op; `attach_functions` adds the bodies of those used to the model, so any
runtime can run the file.

Bodies use only what every runtime supports. ONNX Runtime's CPU has no `Where` on bool. TensorRT wants constant
reduction axes and promises no order of equal values in TopK, so every TopK whose indices are read sorts distinct
numbers. Its parser looks at an op's name alone, so no function may have the name of a standard op.
"""

from __future__ import annotations

import onnx_ir as ir

from vtexport.graph.domains import DOMAIN_VERSION
from vtexport.graph.nn_functions import NN_FUNCTIONS
from vtexport.graph.pruning_functions import PRUNING_FUNCTIONS

FUNCTIONS = (*PRUNING_FUNCTIONS, *NN_FUNCTIONS)


def attach_functions(model: ir.Model) -> None:
    """Add to `model` the body of every function that a node of its graph calls."""
    called = {node.op_identifier() for node in model.graph}
    for function in FUNCTIONS:
        body = ir.serde.deserialize_function(function.to_function_proto())
        if body.identifier() in called:
            model.functions[body.identifier()] = body
    for domain, _, _ in model.functions:
        model.graph.opset_imports[domain] = DOMAIN_VERSION
