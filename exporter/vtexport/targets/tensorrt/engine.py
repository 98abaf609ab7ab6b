"""Runs the plans of a bundle on a GPU: vision, and prefill and decode as profiles of the language plan.

Written against TensorRT's documented API and tested with a stand-in for it (`tests/targets/stand_in.py`), which runs the
same graphs on a CPU; vtexport's own tests have had no GPU and have never run a plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError, TargetError
from vtexport.pruning import PruningPlan
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput
from vtexport.targets.language import LANGUAGE, LanguageCalls
from vtexport.targets.tensorrt.bindings import Bindings
from vtexport.targets.tensorrt.gpu import Gpu, OnGpu
from vtexport.targets.tensorrt.plan import Plan, Reading
from vtexport.targets.tensorrt.profiles import Limits


@dataclass(frozen=True)
class Opening:
    """What to open: each plan's file by graph, how it is read, what it was built from, and the limits of the build."""

    files: Mapping[str, Path]
    readings: Mapping[str, Reading]
    plans: Sequence[PruningPlan]
    limits: Limits


@dataclass(eq=False)
class Lane:
    """Everything that decoding a batch of one size needs: caches of full capacity, inputs, outputs, and a CUDA graph.

    It also owns a context of the language plan, by its number.

    A lane belongs to the engine. One request after the other has it, so that buffers are allocated and the graph is
    captured once.
    """

    number: int
    caches: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    replay: Callable[[], None] | None = None
    capturable: bool = True

    @property
    def nbytes(self) -> int:
        return sum(int(buffer.numel()) * int(buffer.element_size()) for buffer in self.caches.values())


@dataclass(eq=False)
class CudaCache:
    """The KV cache of a batch: a lane, which goes back to the engine when nobody has this any more."""

    lane: Lane
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return self.lane.nbytes

    def broken_layer(self, row: int) -> int | None:
        """See `vtexport.targets.engine.Cache`; caches stay on the GPU."""
        return None


class TensorRTEngine:
    """The plans of a bundle on the current GPU."""

    def __init__(self, bindings: Bindings, opening: Opening) -> None:
        self._bindings, self._opening = bindings, opening
        self._calls = LanguageCalls(opening.plans)
        self._plans: dict[str, Plan] = {}
        self._idle: dict[int, list[Lane]] = {}
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._made = 0
        self._clocks: dict[str, tuple[Any, Any]] = {}
        self._profiling = False

    @cached_property
    def _gpu(self) -> Gpu:
        return Gpu()

    def load(self) -> None:
        for name in self._opening.files:
            self.plan(name)

    def plan(self, name: str) -> Plan:
        """The plan of graph `name`, read at its first use."""
        if name not in self._plans:
            with self._gpu.working():
                file, reading = self._opening.files[name], self._opening.readings[name]
                self._plans[name] = Plan(self._bindings, self._gpu, file, reading)
        return self._plans[name]

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        limits = self._opening.limits
        if rows > limits.max_batch:
            raise InputError(
                f"this bundle was built for at most {limits.max_batch} prompts per batch, not {rows}; ask fewer at a "
                f"time, or build it again with --max-batch {rows}"
            )
        if text + new_tokens > limits.max_text:
            raise InputError(
                f"this bundle was built for at most {limits.max_text} text tokens of prompt and answer together, not "
                f"{text} + {new_tokens}; shorten them, or build it again with --max-text {text + new_tokens}"
            )

    def device_times(self) -> dict[str, float]:
        times = {}
        for name, (start, end) in self._clocks.items():
            end.synchronize()
            times[name] = float(start.elapsed_time(end))
        return times

    def vision(self, inputs: VisionInput) -> VisionOutput:
        feeds = self.vision_feeds(inputs)
        self.admit(len(inputs.pixel_values), 0, 0)
        with self._gpu.working():
            with self._timed("vision"):
                outputs = self.plan("vision").run(0, {name: self._gpu.put(array) for name, array in feeds.items()})
            named = {self.vision_name(name): tensor for name, tensor in outputs.items()}
            # Visual tokens go on to prefill and stay where they are; the rest is small and for the host.
            return VisionOutput({name: self._output(name, tensor) for name, tensor in named.items()})

    def vision_feeds(self, inputs: VisionInput) -> dict[str, Array]:
        """The vision plan's inputs by its own names."""
        return inputs.feeds()

    def vision_name(self, output: str) -> str:
        """The name in `VisionOutput` of an output of the vision plan."""
        return output

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        rows = len(inputs.input_ids)
        self.admit(rows, inputs.input_ids.shape[1], new_tokens)
        plan, prompt = self.plan(LANGUAGE), self._calls.prefill(inputs, bucket)
        with self._gpu.working():
            lane = self._lane(plan, rows)
            cache = CudaCache(lane)
            weakref.finalize(cache, self._give_back, rows, lane)
            feeds = {name: self._tensor(array) for name, array in prompt.items()}
            with self._timed("prefill"):
                outputs = plan.run(bucket, {**feeds, **lane.caches})
            self._begin(lane, prompt, rows)
            arrays = {name: self._gpu.fetch(tensor) for name, tensor in outputs.items()}
        if "ranking" in arrays:
            cache.ranking = np.zeros_like(arrays["ranking"])
        return self._calls.prefilled(arrays, cache, bucket)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, CudaCache)
        lane, plan = cache.lane, self.plan(LANGUAGE)
        with self._gpu.working():
            for name, array in {"input_ids": tokens[:, None], "length": length, "position": position}.items():
                self._gpu.write(np.asarray(array, dtype=np.int64), lane.inputs[name])
            with self._timed("decode"):
                self._step(lane, plan)
            if "ranking" in lane.outputs:
                cache.ranking = self._gpu.fetch(lane.outputs["ranking"])
            return self._gpu.fetch(lane.outputs["logits"])

    def retain(self, cache: Cache, rows: Array) -> bool:
        """No row leaves a batch: its lane, with the captured graph, is for one size of batch.

        A smaller one would need a lane of its own beside it, with caches of full capacity and a graph captured anew.
        """
        return False

    def join(self, cache: Cache, other: Cache) -> bool:
        """No row joins a batch either."""
        return False

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        times: dict[str, dict[str, float]] = {}
        self.load()
        with self._profilers(times):
            call()
        return times

    @property
    def _decode_profile(self) -> int:
        return len(self._opening.plans)

    def _lane(self, plan: Plan, rows: int) -> Lane:
        """An idle lane for `rows` prompts, or a new one; where memory is short, idle lanes of other sizes make room."""
        idle = self._idle.setdefault(rows, [])
        if idle:
            return idle.pop()
        shapes = {name: [rows, *plan.extent(name)[1:]] for name in plan.inputs if name.startswith("past.")}

        def made() -> Lane:
            # Zeros, because what lies behind a row's length is multiplied by attention of zero.
            caches = {name: self._gpu.zeros(shape, plan.kinds[name]) for name, shape in shapes.items()}
            self._made += 1
            lane = Lane(self._made, caches)
            self._lanes.add(lane)
            return lane

        try:
            with self._gpu.working():
                return made()
        except TargetError:
            if not any(self._idle.values()):
                raise
        for idle_lane in (lane for lanes in self._idle.values() for lane in lanes):
            plan.release(idle_lane.number)
        self._idle.clear()
        self._gpu.free_unused()
        return made()

    def _give_back(self, rows: int, lane: Lane) -> None:
        self._idle.setdefault(rows, []).append(lane)

    def _begin(self, lane: Lane, prompt: Mapping[str, Array], rows: int) -> None:
        """Put what decoding needs of a prompt into the lane's own inputs, whose addresses do not change."""
        nothing: Array = np.zeros((self._opening.plans[0].num_layers, rows), dtype=np.int64)
        wanted = self._calls.decode(prompt, nothing[0], nothing, nothing)
        for name, array in wanted.items():
            tensor = self._tensor(array)
            if name in lane.inputs:
                lane.inputs[name].copy_(tensor)
            else:
                lane.inputs[name] = tensor.clone()

    def _step(self, lane: Lane, plan: Plan) -> None:
        profile = self._decode_profile
        if lane.replay is not None and not self._profiling:
            lane.replay()
            return
        lane.outputs = plan.run(profile, {**lane.inputs, **lane.caches}, lane.outputs, owner=lane.number)
        lane.steps += 1
        # TensorRT must have run once in these shapes before it can be captured.
        if lane.steps > 1 and lane.capturable and not self._profiling and not plan.captures_itself:
            lane.replay = self._gpu.captured(lambda: plan.enqueue(profile, lane.number))
            lane.capturable = lane.replay is not None

    def _tensor(self, array: Any) -> Any:
        """An array, or an output of the vision plan, as a tensor on the GPU."""
        return array.tensor if isinstance(array, OnGpu) else self._gpu.put(array)

    def _output(self, name: str, tensor: Any) -> Any:
        return OnGpu(self._gpu, tensor) if name.partition(".")[0] == "visual" else self._gpu.fetch(tensor)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Record when the work inside begins and ends on the GPU."""
        start, end = self._clocks.setdefault(name, (self._gpu.event(), self._gpu.event()))
        start.record()
        yield
        end.record()

    @contextmanager
    def _profilers(self, times: dict[str, dict[str, float]]) -> Iterator[None]:
        trt = self._bindings.trt

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self, layers: dict[str, float]) -> None:
                trt.IProfiler.__init__(self)
                self.layers = layers

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.layers[layer_name] = self.layers.get(layer_name, 0.0) + ms

        def profiler(name: str) -> Any:
            return Profiler(times.setdefault(name, {}))

        buckets = range(self._decode_profile)
        # Contexts do not own their profilers.
        profilers = {name: {0: profiler(name)} for name in self._plans if name != LANGUAGE}
        if LANGUAGE in self._plans:
            prefills = dict.fromkeys(buckets, profiler("prefill"))
            profilers[LANGUAGE] = {**prefills, self._decode_profile: profiler("decode")}
        self._profile(profilers)
        try:
            yield
        finally:
            self._profile({})

    def _profile(self, profilers: Mapping[str, Mapping[int, Any]]) -> None:
        """Profile with `profilers` by plan and profile, or with none no more."""
        self._profiling = bool(profilers)
        for name, plan in self._plans.items():
            plan.profile_layers(profilers.get(name))
        # Graphs were captured with contexts that are gone.
        for lane in self._lanes:
            lane.replay, lane.steps = None, 0
