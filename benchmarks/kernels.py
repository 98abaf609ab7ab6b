"""The pruning ops of one decoder stage: native kernels against PyTorch eager and torch.compile. Part of gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from clock import Call, Clock, captured, in_turns

from vtexport.models.spec import ModelSpec
from vtexport.native import kernels as native
from vtexport.pruning import plain
from vtexport.pruning.schedule import Recycling

#: bytes/s and bf16 tensor-core FLOP/s of GPUs, from NVIDIA's data sheets (dense, no sparsity), by a part of their names
PEAKS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.0e12, 312e12),
    "L40S": (0.864e12, 362e12),
    "RTX 4090": (1.008e12, 165e12),
    "RTX 5090": (1.792e12, 210e12),
}
OPS = ("token_score", "token_select", "token_recycle")


@dataclass(frozen=True)
class Kernel:
    """One op, or all of a stage: microseconds of each implementation, and the least that the GPU's limits allow.

    Implementations run as CUDA graphs if they can be captured; `captured` names those that were.
    """

    name: str
    eager: float
    compiled: float
    native: float | None
    least: float | None
    captured: list[str]


def stage_arguments(
    spec: ModelSpec, batch: int, text: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[Any, ...]]:
    """Arguments for the ops of SparseVLM's first stage: all visual tokens in, a third kept, all text rows rating."""
    d, visual = spec.decoder, spec.num_visual_tokens
    noise = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    keys, keep = visual + text, visual // 3
    pool, clusters = Recycling().counts(visual - keep)
    query, key = random(batch, d.num_heads, text, d.head_size), random(batch, d.num_kv_heads, keys, d.head_size)
    counts = torch.ones(batch, text, device=device) > 0
    places = torch.arange(visual, keys, device=device).expand(batch, -1).contiguous()
    start = torch.full((batch,), 5, device=device, dtype=torch.int64)
    hidden, score = random(batch, visual, d.hidden_size), torch.rand(batch, visual, generator=noise, device=device)
    return {
        "token_score": (query, key, counts, places, start, visual, d.head_size**-0.5),
        "token_select": (hidden, score, keep),
        "token_recycle": (hidden, score, keep, pool, clusters, False),
    }


def least_microseconds(arguments: dict[str, tuple[Any, ...]], device_name: str) -> dict[str, float] | None:
    """Microseconds by the roofline: every element is read, written and multiplied once; None for an unknown GPU."""
    peaks = next((value for name, value in PEAKS.items() if name in device_name), None)
    if peaks is None:
        return None
    query, key, *_, visual, _ = arguments["token_score"]
    hidden, _, keep = arguments["token_select"]
    _, _, _, pool, clusters, _ = arguments["token_recycle"]
    batch, heads, rows, size = query.shape
    width, element = hidden.shape[2], hidden.element_size()
    moved = {
        "token_score": query.nbytes + key.nbytes + 4 * batch * visual,
        "token_select": 4 * batch * visual + 2 * batch * keep * width * element,
        "token_recycle": 4 * batch * visual + batch * (pool + clusters) * width * element,
    }
    multiplied = {
        "token_score": 2 * batch * heads * rows * key.shape[2] * size,
        "token_select": 0,
        "token_recycle": 2 * batch * pool * pool * width,
    }
    return {name: 1e6 * max(moved[name] / peaks[0], multiplied[name] / peaks[1]) for name in OPS}


def measure_kernels(spec: ModelSpec, batch: int, text: int, device: str, device_name: str, runs: int) -> list[Kernel]:
    """Measure each op, and then the three of a stage together."""
    arguments = stage_arguments(spec, batch, text, device, torch.bfloat16)
    # On a CPU, where the script is only tried out, skip the minutes that compiling takes.
    backend = "inductor" if device == "cuda" else "aot_eager"

    def calls(of: Callable[[str], Callable[..., Any]]) -> dict[str, Call]:
        single: dict[str, Call] = {name: _bound(of(name), arguments[name]) for name in OPS}
        return {**single, "stage": lambda: [call() for call in single.values()]}

    sides = {
        "eager": calls(lambda name: getattr(plain, name)),
        "compiled": calls(lambda name: torch.compile(getattr(plain, name), backend=backend)),
    }
    if native.available(device):
        sides["native"] = calls(lambda name: getattr(native, name))
    ready = {(op, side): captured(call, device) for side, ops in sides.items() for op, call in ops.items()}
    times = in_turns({name: call for name, (call, _) in ready.items()}, Clock(device), runs)
    least = least_microseconds(arguments, device_name)
    limits = None if least is None else {**least, "stage": sum(least.values())}
    return [
        Kernel(
            name=op,
            eager=1000 * times[op, "eager"],
            compiled=1000 * times[op, "compiled"],
            native=1000 * times[op, "native"] if "native" in sides else None,
            least=None if limits is None else limits[op],
            captured=[side for side in sides if ready[op, side][1]],
        )
        for op in (*OPS, "stage")
    ]


def _bound(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Call:
    return lambda: call(*arguments)


def kernel_table(kernels: list[Kernel]) -> str:
    """A Markdown table with a row per op."""
    lines = [
        "| op | eager µs | torch.compile µs | native µs | eager / native | of the roofline |",
        "| --- " * 6 + "|",
    ]
    for kernel in kernels:
        cells = ["", "", ""]
        if kernel.native is not None:
            share = "" if kernel.least is None else f"{kernel.least / kernel.native:.0%}"
            cells = [f"{kernel.native:.1f}", f"{kernel.eager / kernel.native:.1f}x", share]
        lines.append(f"| {kernel.name} | {kernel.eager:.1f} | {kernel.compiled:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)
