"""The pruning ops of one decoder stage: native kernels against PyTorch eager and torch.compile. Part of gpu.py.

A kernel of a few microseconds is measured wrongly in two ways: alone, it costs what launching it costs, and again and
again on the same arrays, it finds them in the GPU's cache. So each implementation runs over as many sets of arguments as
the cache cannot hold, many times, in one CUDA graph, and the time is divided by the number of calls.

Beside the measured times stand those that the written kernels should take (`Work.microseconds`), and the number of
launches that the GPU saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
#: launches of each op's kernels, where there are clusters of blocks (compute capability 9.0 and later) and elsewhere;
#: tests count them in the emulator
LAUNCHES = {"token_score": (2, 3), "token_select": (1, 1), "token_recycle": (3, 3)}
#: microseconds between the beginning of a launch's work and the end of the one before it in a CUDA graph: assumed
LAUNCH_GAP = 1.0
#: rows that count, per block of token_score (kMostRows in plugins/cuda/token_score.cu)
GROUP = 64
#: calls per CUDA graph, at least
CALLS = 100


@dataclass(frozen=True)
class Work:
    """What the written kernels of an op do.

    Args:
        launches: of kernels, one after the other.
        moved: bytes that pass between memory and the kernels; what a later launch reads of an earlier one included.
        multiplied: FLOPs.
    """

    launches: int
    moved: float
    multiplied: float

    def microseconds(self, bandwidth: float, flops: float) -> float:
        """The time at a GPU's limits, bytes/s and FLOP/s: gaps, transfers and products one after the other."""
        return self.launches * LAUNCH_GAP + 1e6 * (self.moved / bandwidth + self.multiplied / flops)

    def __add__(self, other: Work) -> Work:
        return Work(self.launches + other.launches, self.moved + other.moved, self.multiplied + other.multiplied)


@dataclass(frozen=True)
class Kernel:
    """One op, or all of a stage: microseconds of each implementation, and the least that the GPU's limits allow.

    `expected` is `Work.microseconds` of the native kernels. `launches` counts kernels and copies that the GPU ran per
    call, by implementation. Implementations run as CUDA graphs if they can be captured; `captured` names those that were.
    """

    name: str
    eager: float
    compiled: float
    native: float | None
    least: float | None
    expected: float | None
    launches: dict[str, int]
    captured: list[str]


def stage_arguments(
    spec: ModelSpec, batch: int, text: int, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, tuple[Any, ...]]:
    """Arguments for the ops of a stage of SparseVLM: all visual tokens in, a quarter kept, all text rows rating.

    With LLaVA-1.5-7B's 576 visual and 64 text tokens, 146 are kept, and 130 of the others merged into 14.
    """
    d, visual = spec.decoder, spec.num_visual_tokens
    noise = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    keys, keep = visual + text, visual * 146 // 576
    pool, clusters = Recycling().counts(visual - keep)
    query, key = random(batch, d.num_heads, text, d.head_size), random(batch, d.num_kv_heads, keys, d.head_size)
    places = torch.arange(visual, keys, device=device).expand(batch, -1).contiguous()
    start = torch.full((batch,), 5, device=device, dtype=torch.int64)
    hidden, score = random(batch, visual, d.hidden_size), torch.rand(batch, visual, generator=noise, device=device)
    rank = score.argsort(dim=1).argsort(dim=1).int()
    return {
        "token_score": (query, key, places, start, visual, d.head_size**-0.5),
        "token_select": (hidden, score, keep),
        "token_recycle": (hidden, rank, keep, pool, clusters, False),
    }


def written_work(arguments: dict[str, tuple[Any, ...]], clusters: bool) -> dict[str, Work]:
    """What the native kernels do with `arguments` on a GPU with clusters of blocks, or on one without."""
    query, key, *_, visual, _ = arguments["token_score"]
    hidden, _, keep = arguments["token_select"]
    _, _, _, pool, merged, _ = arguments["token_recycle"]
    batch, heads, rows, size = query.shape
    width, element = hidden.shape[2], hidden.element_size()
    keys = key.shape[2]
    # Without clusters, the visual columns are read and multiplied a second time.
    again = 0.0 if clusters else visual / keys
    by_head = 4 * batch * heads * math.ceil(rows / GROUP) * visual
    squared = 4 * batch * pool * pool
    moved = {
        "token_score": query.nbytes + key.nbytes * (1 + again) + 2 * by_head + 4 * batch * visual,
        "token_select": 8 * batch * visual + 2 * batch * keep * width * element,
        # The pool's rows are read for their distances and for their sums, distances written once and read twice.
        "token_recycle": batch * (2 * pool + merged) * width * element + 3 * squared,
    }
    multiplied = {
        "token_score": 2 * batch * heads * rows * keys * size * (1 + again),
        "token_select": 0,
        "token_recycle": 2 * batch * pool * pool * width,
    }
    return {op: Work(LAUNCHES[op][0 if clusters else 1], moved[op], multiplied[op]) for op in OPS}


def sets_beyond(cache: int, touched: int) -> int:
    """How many sets of arguments to cycle through, so that two caches of others pass before one comes up again.

    Args:
        cache: bytes of the GPU's cache.
        touched: bytes of a set that a call reads.
    """
    return math.ceil(2 * cache / touched) + 1


def over_sets(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int) -> tuple[Call, int]:
    """A call of `call` on set after set, as many whole rounds as make `calls` calls, and how many calls that are."""
    rounds = math.ceil(calls / len(sets))

    def run() -> None:
        for _ in range(rounds):
            for arguments in sets:
                call(*arguments)

    return run, rounds * len(sets)


def count_launches(call: Call) -> int:
    """How many kernels and copies a call makes a GPU run."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


def least_microseconds(arguments: dict[str, tuple[Any, ...]], peaks: tuple[float, float]) -> dict[str, float]:
    """Microseconds by the roofline of a GPU of those peaks: every element is read, written and multiplied once."""
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


def _sets(spec: ModelSpec, batch: int, text: int, device: str) -> list[dict[str, tuple[Any, ...]]]:
    """Sets of arguments that no cache of the device holds together; on a CPU, where the script is tried out, one."""
    first = stage_arguments(spec, batch, text, device, torch.bfloat16)
    if device != "cuda":
        return [first]
    hidden, _, _, pool, *_ = first["token_recycle"]
    touched = batch * pool * hidden.shape[2] * hidden.element_size()  # by the op that reads least
    number = sets_beyond(torch.cuda.get_device_properties(device).L2_cache_size, touched)
    return [first, *(stage_arguments(spec, batch, text, device, torch.bfloat16, seed) for seed in range(1, number))]


def measure_kernels(spec: ModelSpec, batch: int, text: int, device: str, device_name: str, runs: int) -> list[Kernel]:
    """Measure each op, and then the three of a stage together."""
    sets = _sets(spec, batch, text, device)
    # On a CPU, skip the minutes that compiling takes.
    backend = "inductor" if device == "cuda" else "aot_eager"

    def stage_of(single: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
        return lambda given: [single[op](*given[op]) for op in OPS]

    def bound(of: Callable[[str], Callable[..., Any]]) -> dict[str, tuple[Call, Call, int]]:
        """By op: one call, the measured one, and how many calls that makes."""
        single = {op: of(op) for op in OPS}
        every: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
            **{op: (single[op], [given[op] for given in sets]) for op in OPS},
            "stage": (stage_of(single), [(given,) for given in sets]),
        }
        calls = CALLS if device == "cuda" else 1
        return {
            op: (over_sets(call, given[:1], 1)[0], *over_sets(call, given, calls))
            for op, (call, given) in every.items()
        }

    sides = {
        "eager": bound(lambda op: getattr(plain, op)),
        "compiled": bound(lambda op: torch.compile(getattr(plain, op), backend=backend)),
    }
    if native.available(device):
        sides["native"] = bound(lambda op: getattr(native, op))
    ready = {(op, side): captured(call, device) for side, ops in sides.items() for op, (_, call, _) in ops.items()}
    times = in_turns({name: call for name, (call, _) in ready.items()}, Clock(device), runs)

    def microseconds(op: str, side: str) -> float:
        return 1000 * times[op, side] / sides[side][op][2]

    peaks = next((value for name, value in PEAKS.items() if name in device_name), None)
    least: dict[str, float] | None = None
    expected: dict[str, float] | None = None
    if peaks is not None:
        least = least_microseconds(sets[0], peaks)
        least["stage"] = sum(least.values())
        work = written_work(sets[0], clusters=torch.cuda.get_device_capability(device) >= (9, 0))
        work["stage"] = work["token_score"] + work["token_select"] + work["token_recycle"]
        expected = {op: of.microseconds(*peaks) for op, of in work.items()}
    return [
        Kernel(
            name=op,
            eager=microseconds(op, "eager"),
            compiled=microseconds(op, "compiled"),
            native=microseconds(op, "native") if "native" in sides else None,
            least=None if least is None else least[op],
            expected=None if expected is None else expected[op],
            launches={side: count_launches(ops[op][0]) for side, ops in sides.items()} if device == "cuda" else {},
            captured=[side for side in sides if ready[op, side][1]],
        )
        for op in (*OPS, "stage")
    ]


def kernel_table(kernels: list[Kernel]) -> str:
    """A Markdown table with a row per op."""
    lines = [
        "| op | eager µs | torch.compile µs | native µs | eager / native | expected µs | of the roofline | launches |",
        "| --- " * 8 + "|",
    ]
    for kernel in kernels:
        cells = ["", ""]
        if kernel.native is not None:
            cells = [f"{kernel.native:.1f}", f"{kernel.eager / kernel.native:.1f}x"]
        cells.append("" if kernel.expected is None else f"{kernel.expected:.1f}")
        share = "" if kernel.native is None or kernel.least is None else f"{kernel.least / kernel.native:.0%}"
        cells.append(share)
        cells.append(", ".join(f"{side} {number}" for side, number in kernel.launches.items()))
        lines.append(f"| {kernel.name} | {kernel.eager:.1f} | {kernel.compiled:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)
