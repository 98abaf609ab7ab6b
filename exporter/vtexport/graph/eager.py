"""Modules of this package with a checkpoint's weights, for PyTorch to run as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtexport.arrays import Array
from vtexport.errors import ModelError
from vtexport.models.names import PREFIXES

#: what a bundle's dtype is in PyTorch
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def of_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have parameters of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fill(module: nn.Module, weights: Mapping[str, Any], computed: Mapping[str, Array]) -> None:
    """Give every parameter and buffer of `module` its values, in the dtype and on the device that it has.

    Args:
        module: a module of this package.
        weights: tensors by their names in a checkpoint, or anything whose `[:]` is one.
        computed: arrays by the names that the module gives them, such as a method's constants.

    Raises:
        ModelError: a tensor is missing, or has another shape than the module.
    """
    for name, place in [*module.named_parameters(), *module.named_buffers()]:
        values = torch.from_numpy(computed[name]) if name in computed else _find(weights, name)
        if values.shape != place.shape:
            raise ModelError(
                f"tensor {name} has shape {tuple(values.shape)} but the bundle was built for {tuple(place.shape)}; "
                "give the checkpoint that the bundle was built from"
            )
        place.data.copy_(values)


def _find(weights: Mapping[str, Any], name: str) -> Tensor:
    """The tensor that a checkpoint, or a bundle, holds for the parameter `name`."""
    names = [name]
    for prefix, theirs in PREFIXES.items():
        if name.startswith(prefix):
            names += [other + name.removeprefix(prefix) for other in theirs]
    for candidate in names:
        if candidate in weights:
            found: Tensor = weights[candidate][:]
            return found
    raise ModelError(f"the checkpoint has no tensor {names[:2][-1]}; it is incomplete, get it again")
