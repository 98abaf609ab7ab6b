"""Times calls on a device, and captures them as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

WARM_UP = 3
Call = Callable[[], Any]


class Clock:
    """Milliseconds of a call, by CUDA events on a GPU and by the wall clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, call: Call) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def captured(call: Call, device: str) -> tuple[Call, bool]:
    """`call` as a CUDA graph, and True; or `call` itself, and False, if there is no GPU or the call synchronises."""
    if device != "cuda":
        return call, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False
    return graph.replay, True


def in_turns(calls: Mapping[Any, Call], clock: Clock, runs: int) -> dict[Any, float]:
    """Median milliseconds of each call; calls alternate, so that drift of the machine affects all alike."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for run in range(WARM_UP + runs):
        for name, call in calls.items():
            spent = clock(call)
            if run >= WARM_UP:
                times[name].append(spent)
    return {name: median(spent) for name, spent in times.items()}
