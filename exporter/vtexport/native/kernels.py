"""The native kernels of `plugins/`, if they were built: the CUDA kernels and their CPU twins.

The functions are those of `vtexport.pruning.ops`, for tensors on either device. CUDA kernels run on PyTorch's current
stream, never synchronise, and may be captured in a CUDA graph. `vtexport.pruning.ops` calls them for tensors on a GPU;
on a CPU it uses PyTorch's own arithmetic, which is faster than the twins, since those are written to be plain.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # documented there all the same

from vtexport.errors import TargetError

#: element types that kernels take
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _load(name: str) -> Any:
    try:
        return import_module(f"vtexport.{name}")
    except ImportError:  # its compiler was missing at installation
        return None


_twins, _cuda = _load("_native"), _load("_cuda")


def available(device: str = "cpu") -> bool:
    """Whether this installation has kernels for the device type, "cpu" or "cuda"."""
    return (_twins if device == "cpu" else _cuda) is not None


class Architectures(NamedTuple):
    """The compute capabilities that the CUDA kernels were compiled for, such as 89; none if they were not built."""

    #: as machine code, which GPUs of the same generation (89 / 10) and an equal or later minor number run
    code: tuple[int, ...]
    #: as PTX, which the driver of any GPU that is at least as new compiles when it loads the module
    ptx: tuple[int, ...]


def architectures() -> Architectures:
    """What the CUDA kernels of this installation were compiled for."""
    if _cuda is None:
        return Architectures((), ())
    return Architectures(*(_numbers(stated) for stated in (_cuda.ARCHITECTURES, _cuda.PTX)))


def _numbers(stated: str) -> tuple[int, ...]:
    return tuple(int(number) for number in stated.split(","))


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the CUDA kernels run on GPUs of a compute capability, as `torch.cuda.get_device_capability` gives it."""
    major, minor = capability
    made = architectures()
    return any(code // 10 == major and code % 10 <= minor for code in made.code) or any(
        ptx <= 10 * major + minor for ptx in made.ptx
    )


def token_score(query: Tensor, key: Tensor, places: Tensor, start: Tensor, count: int, scale: float) -> Tensor:
    """`vtexport.pruning.ops.token_score` by the native kernel; dtypes fp32, fp16, bf16."""
    return _score((query, key, places, start), None, count, scale, 0)


def token_score_heads(
    query: Tensor,
    key: Tensor,
    places: Tensor,
    start: Tensor,
    divisor: Tensor,
    count: int,
    scale: float,
    heads: int,
) -> Tensor:
    """`vtexport.pruning.ops.token_score_heads` by the native kernel; dtypes fp32, fp16, bf16."""
    return _score((query, key, places, start), divisor, count, scale, heads)


def token_select(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """`vtexport.pruning.ops.token_select` by the native kernel; dtypes fp32, fp16, bf16."""
    batch, tokens, width = hidden.shape
    kept = hidden.new_empty(batch, max(keep, 0), width)
    index = torch.empty(batch, max(keep, 0), dtype=torch.int32, device=hidden.device)
    rank = torch.empty(batch, tokens, dtype=torch.int32, device=hidden.device)
    _run("token_select", (hidden, score, kept, index, rank))
    return kept, index, rank


def token_recycle(
    hidden: Tensor, rank: Tensor, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`vtexport.pruning.ops.token_recycle` by the native kernel; dtypes fp32, fp16, bf16."""
    batch, tokens, width = hidden.shape
    merged = hidden.new_empty(batch, max(clusters, 0), width)
    centres = torch.empty(batch, max(clusters, 0), dtype=torch.int32, device=hidden.device)
    cluster = torch.empty(batch, tokens, dtype=torch.int32, device=hidden.device)
    _run("token_recycle", (hidden, rank, merged, centres, cluster), keep, pool, paper)
    return merged, centres, cluster


def _score(arrays: tuple[Tensor, ...], divisor: Tensor | None, count: int, scale: float, heads: int) -> Tensor:
    score = torch.empty(arrays[0].shape[0], count, device=arrays[0].device)
    _run("token_score", (*arrays, divisor, score), scale, heads)
    return score


def _run(name: str, tensors: tuple[Tensor | None, ...], *attributes: float) -> None:
    """Call kernel `name`; outputs, which are contiguous, are the last of `tensors`."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    dense = [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]
    # `to_dlpack` waits for no stream, whereas `__dlpack__` would make the default stream wait.
    arrays = [None if tensor is None else to_dlpack(tensor) for tensor in dense]
    if device.type == "cpu":
        getattr(_module(_twins, "a C++ compiler").Kernels(), name)(*arrays, *attributes)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        kernels = _module(_cuda, "nvcc").Kernels(lambda size: _workspace(size, device), stream)
        getattr(kernels, name)(*arrays, *attributes)


def _workspace(size: int, device: torch.device) -> Any:
    return to_dlpack(torch.empty(size, dtype=torch.uint8, device=device))


def _module(module: Any, compiler: str) -> Any:
    if module is None:
        raise TargetError(
            f"the native kernels were not built; install {compiler} and then vtexport again, from its source"
        )
    return module
