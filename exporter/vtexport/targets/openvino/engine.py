"""Runs a bundle's graphs on OpenVINO: NumPy in, NumPy out, a batch's KV cache in an inference request's state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vtexport.arrays import Array
from vtexport.errors import TargetError, first_line
from vtexport.pruning import PruningPlan
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput
from vtexport.targets.language import LANGUAGE, LanguageCalls
from vtexport.targets.openvino.lowering import BEAM, PROMPT
from vtexport.targets.openvino.memory import Released
from vtexport.targets.openvino.reading import read_model


@dataclass(frozen=True)
class Opening:
    """What an engine is opened with.

    Attributes:
        files: the bundle's files by graph.
        plans: the plans that share the language graph.
        device: a device of OpenVINO's.
        config: OpenVINO's settings for it.
    """

    files: Mapping[str, Path]
    plans: Sequence[PruningPlan]
    device: str
    config: Mapping[str, Any]


@dataclass
class Model:
    """A graph that was opened.

    Attributes:
        compiled: OpenVINO's compiled model.
        outputs: the names of the graph's outputs, which a compiled model mixes with others.
        runs: how often it ran.
        last: the request that it ran last, if layers are timed.
        free: requests whose batches are over. Their states keep the memory, for which the system would otherwise be
            asked anew in the first decode step of every batch.
    """

    compiled: Any
    outputs: Sequence[str]
    runs: int = 0
    last: Any = None
    free: list[Any] = field(default_factory=list)

    def request(self) -> Any:
        """A request whose state is empty."""
        if not self.free:
            return self.compiled.create_infer_request()
        request = self.free.pop()
        request.reset_state()
        return request

    def layer_times(self) -> dict[str, float]:
        """Milliseconds of each layer over all runs; OpenVINO gives their mean."""
        times: dict[str, float] = {}
        for layer in [] if self.last is None else self.last.get_profiling_info():
            label = f"{layer.node_name} ({layer.node_type})"
            times[label] = times.get(label, 0.0) + 1000 * self.runs * layer.real_time.total_seconds()
        return times


@dataclass
class StateCache:
    """A batch's KV cache: the state of an inference request of its own.

    Attributes:
        request: the request.
        given: the inputs of its prompts, or what decoding needs of these.
        prompt: [N, B] int64, tokens of each row's prompt in each layer; None before the first step.
        beams: [B'] int64, the rows of the state that go on with the next step; None for all.
        ranking: see `vtexport.targets.engine.Cache`.
    """

    request: Any
    given: Mapping[str, Array]
    prompt: Array | None = None
    beams: Array | None = None
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(int(state.state.byte_size) for state in self.request.query_state())


class OpenVinoEngine:
    """The models of a bundle; each is read and compiled when it is first used."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._calls = LanguageCalls(opening.plans)
        self._models: dict[str, Model] = {}
        self._profiling = False

    @property
    def _folder(self) -> Path:
        """Where the weights lie."""
        return self._opening.files["vision"].parent

    def load(self) -> None:
        for name in self._opening.files:
            self.model(name)

    def model(self, name: str) -> Model:
        """The model of graph `name`."""
        if name not in self._models:
            path, config = self._opening.files[name], dict(self._opening.config)
            if self._profiling:
                config["PERF_COUNT"] = True
            try:
                model = read_model(path)
                names = [port.get_any_name() for port in model.outputs]
                with Released(self._folder):
                    compiled = ov.Core().compile_model(model, self._opening.device, config)
                self._models[name] = Model(compiled, names)
            except Exception as error:  # OpenVINO raises its own exception types, none of them public
                raise TargetError(
                    f"OpenVINO cannot load {path} ({first_line(error)}); build the bundle again"
                ) from error
        return self._models[name]

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        """Every extent but the model's own is open here."""

    def device_times(self) -> dict[str, float]:
        return {}

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        plain, self._models, self._profiling = self._models, {}, True
        try:
            call()
            return {name: model.layer_times() for name, model in self._models.items()}
        finally:
            self._models, self._profiling = plain, False

    def vision(self, inputs: VisionInput) -> VisionOutput:
        compiled = self.model("vision").compiled
        outputs = self._run("vision", compiled.create_infer_request(), inputs.feeds())
        # Prefill comes next, and needs room for itself.
        compiled.release_memory()
        return VisionOutput(outputs)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        given = self._calls.prefill(inputs, bucket)
        model = self.model(LANGUAGE)
        cache = StateCache(model.request(), given)
        weakref.finalize(cache, model.free.append, cache.request)
        # Nothing is cached yet, so there is no padding to hide, wherever it may begin.
        outputs = self._run(LANGUAGE, cache.request, {**given, **_behind(given["length"])})
        if "ranking" in outputs:
            cache.ranking = np.zeros_like(outputs["ranking"])
        return PrefillOutput(outputs.pop("logits"), cache, self._calls.stages(outputs, bucket))

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, StateCache)
        if cache.prompt is None:
            cache.prompt = np.array(length, dtype=np.int64)
        given = self._calls.decode(cache.given, tokens, length, position)
        outputs = self._run(LANGUAGE, cache.request, {**given, **_behind(cache.prompt, cache.beams)})
        cache.beams = None
        cache.ranking = outputs.get("ranking")
        return outputs["logits"]

    def retain(self, cache: Cache, rows: Array) -> bool:
        assert isinstance(cache, StateCache)
        # The next step takes these rows out of the state, and its memory shrinks then.
        cache.beams = rows if cache.beams is None else cache.beams[rows]
        cache.given = self._calls.retained(cache.given, rows)
        cache.prompt = None if cache.prompt is None else cache.prompt[:, rows]
        cache.ranking = None if cache.ranking is None else cache.ranking[rows]
        return True

    def _run(self, name: str, request: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a request of graph `name`, and return copies of its outputs by name."""
        model, given = self.model(name), {key: np.ascontiguousarray(array) for key, array in feeds.items()}
        # Part of the weights is packed when they are first used.
        with nullcontext() if model.runs else Released(self._folder):
            results = request.infer(given)
        model.runs += 1
        if self._profiling:
            model.last = request
        return {key: np.array(array) for key, array in zip(model.outputs, results.values(), strict=True)}


def _behind(prompt: Array, beams: Array | None = None) -> dict[str, Array]:
    """The inputs that tell what stands in the caches.

    Args:
        prompt: [N, B], tokens of each row in each layer's cache before any padding.
        beams: [B], where each row stands in the state; None for its own number.
    """
    places: Array = np.arange(prompt.shape[1]) if beams is None else beams
    return {PROMPT: prompt, BEAM: places.astype(np.int32)}
