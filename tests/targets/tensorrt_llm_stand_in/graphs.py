"""What a CUDA graph does: operations on addresses are recorded once, and run again without the Python that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_SYNCS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


class CaptureError(RuntimeError):
    """The pass waits for the GPU, which no graph can."""


def _waits(func: Any, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return func in _SYNCS or torch.Tag.dynamic_output_shape in func.tags


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Graph(TorchDispatchMode):
    """Records under `with`; afterwards `replay` runs the operations on the same memory.

    A tensor that Python made, let go and made anew keeps its old memory here, so that whoever writes into a new buffer is
    not heard. Tensors for the host, arguments whose names begin with `host_`, are as they were when recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run it, and remember it if it does anything but look at memory in another way.

        Raises:
            CaptureError: it needs a value on the host.
        """
        kwargs = kwargs or {}
        if _waits(func, args):
            raise CaptureError(f"{func} waits for the GPU in a pass that is recorded")
        args = tuple(
            value.clone() if isinstance(value, torch.Tensor) and argument.name.startswith("host_") else value
            for argument, value in zip(func._schema.arguments, args, strict=False)
        )
        result = func(*args, **kwargs)
        given = {_storage(one) for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)}
        made = [one for one in tree_flatten(result)[0] if isinstance(one, torch.Tensor)]
        new = [one for one in made if _storage(one) not in given]
        if new or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, new))
        return result

    def replay(self) -> None:
        """Run everything again; results go where they went."""
        for func, args, kwargs, outputs in self.calls:
            result = func(*args, **kwargs)
            if outputs:
                again = [one for one in tree_flatten(result)[0] if isinstance(one, torch.Tensor)]
                for old, new in zip(outputs, again, strict=True):
                    old.copy_(new)
