"""How an op becomes one node of its own domain while a graph is traced to ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: the public domain of the pruning ops, and the domain of transformer parts that runtimes have kernels for
PRUNING = "vtexport"
NN = "vtexport.nn"
DOMAIN_VERSION = 1


def nodes(
    domain: str,
    op_type: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, int | float],
    *,
    like: Sequence[Tensor],
) -> Sequence[Tensor]:
    """A node `domain::op_type` whose outputs have the dtypes and shapes of `like`."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{domain}::{op_type}",
        inputs,
        dict(attributes),
        dtypes=[tensor.dtype for tensor in like],
        shapes=[tensor.shape for tensor in like],
        version=DOMAIN_VERSION,
    )


def node(
    domain: str, op_type: str, inputs: Sequence[Tensor], attributes: Mapping[str, int | float], *, like: Tensor
) -> Tensor:
    """`nodes` with one output."""
    return nodes(domain, op_type, inputs, attributes, like=[like])[0]
