"""Runs a bundle's graphs on OpenVINO, NumPy in and NumPy out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vtexport.arrays import Array
from vtexport.errors import TargetError, first_line
from vtexport.pruning import PruningPlan
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput
from vtexport.targets.external import check_graph
from vtexport.targets.language import LANGUAGE, LanguageCalls
from vtexport.targets.openvino.caches import BatchCache, Caches
from vtexport.targets.openvino.memory import Released
from vtexport.targets.openvino.pages import SUPPORTED, Pages
from vtexport.targets.openvino.reading import read_model
from vtexport.targets.openvino.states import BEAM, States


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
        caches: where it keeps KV caches, if it has any.
        runs: how often it ran.
        last: the request that it ran last, if layers are timed.
    """

    compiled: Any
    outputs: Sequence[str]
    caches: Caches | None
    runs: int = 0
    last: Any = None

    def layer_times(self) -> dict[str, float]:
        """Milliseconds of each layer over all runs; OpenVINO gives their mean."""
        times: dict[str, float] = {}
        for layer in [] if self.last is None else self.last.get_profiling_info():
            label = f"{layer.node_name} ({layer.node_type})"
            times[label] = times.get(label, 0.0) + 1000 * self.runs * layer.real_time.total_seconds()
        return times


class OpenVinoEngine:
    """The models of a bundle; each is read and compiled when it is first used."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._calls = LanguageCalls(opening.plans)
        self._models: dict[str, Model] = {}
        self._profiling = False
        # Batches of several threads may share an inference request, and blocks of the same arrays.
        self._lock = threading.RLock()

    @property
    def _folder(self) -> Path:
        """Where the weights lie."""
        return self._opening.files["vision"].parent

    def load(self) -> None:
        for name in self._opening.files:
            self.model(name)

    def model(self, name: str) -> Model:
        """The model of graph `name`."""
        with self._lock:
            if name not in self._models:
                self._models[name] = self._open(name)
            return self._models[name]

    def _open(self, name: str) -> Model:
        """Read and compile graph `name`."""
        path, config = self._opening.files[name], dict(self._opening.config)
        if self._profiling:
            config["PERF_COUNT"] = True
        check_graph(path)
        try:
            model = read_model(path, pages=SUPPORTED and self._opening.device == "CPU")
            names = [port.get_any_name() for port in model.outputs]
            with Released(self._folder):
                compiled = ov.Core().compile_model(model, self._opening.device, config)
            return Model(compiled, names, _caches(compiled))
        except Exception as error:  # OpenVINO raises its own exception types, none of them public
            raise TargetError(f"OpenVINO cannot load {path} ({first_line(error)}); build the bundle again") from error

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
        # OpenVINO refuses to release memory while a request of another thread runs.
        with self._lock:
            outputs = self._run("vision", compiled.create_infer_request(), inputs.feeds())
            # Prefill comes next, and needs room for itself.
            compiled.release_memory()
        return VisionOutput(outputs)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        given = self._calls.prefill(inputs, bucket)
        rows, text = inputs.input_ids.shape
        places = [text + visual + new_tokens for visual in self._opening.plans[bucket].per_layer]
        caches = self.model(LANGUAGE).caches
        assert caches is not None, "the language model has caches"
        with self._lock:
            cache = caches.start(rows, places)
            cache.given = given
            outputs = self._step(cache, given)
        if "ranking" in outputs:
            cache.ranking = np.zeros_like(outputs["ranking"])
        return self._calls.prefilled(outputs, cache, bucket)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, BatchCache)
        outputs = self._step(cache, self._calls.decode(cache.given, tokens, length, position))
        cache.ranking = outputs.get("ranking")
        return outputs["logits"]

    def retain(self, cache: Cache, rows: Array) -> bool:
        assert isinstance(cache, BatchCache)
        cache.retain(rows)
        cache.given = self._calls.retained(cache.given, rows)
        cache.ranking = None if cache.ranking is None else cache.ranking[rows]
        return True

    def join(self, cache: Cache, other: Cache) -> bool:
        assert isinstance(cache, BatchCache)
        assert isinstance(other, BatchCache)
        if not cache.join(other):
            return False
        cache.given = self._calls.joined(cache.given, other.given)
        return True

    def _step(self, cache: BatchCache, given: Mapping[str, Array]) -> dict[str, Array]:
        """Run the language graph behind a cache."""
        with self._lock:
            return self._run(LANGUAGE, cache.request, {**given, **cache.feeds(given["length"])})

    def _run(self, name: str, request: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a request of graph `name`, and return copies of its outputs by name."""
        model, given = self.model(name), {key: np.ascontiguousarray(array) for key, array in feeds.items()}
        # Part of the weights is packed when a prompt first uses them, and part when a single token does.
        with nullcontext() if model.runs > 1 else Released(self._folder):
            try:
                results = request.infer(given)
            except Exception as error:  # as above
                raise TargetError(
                    f"OpenVINO cannot run {self._opening.files[name]} ({first_line(error)}); if memory is not short, "
                    "check the bundle with vtexport inspect --verify"
                ) from error
        model.runs += 1
        if self._profiling:
            model.last = request
        return {key: np.array(array) for key, array in zip(model.outputs, results.values(), strict=True)}


def _caches(compiled: Any) -> Caches | None:
    """Where a compiled model keeps its caches, as `read_model` made it."""
    names = {name for port in compiled.inputs for name in port.get_names()}
    if "key_cache.0" in names:
        return Pages(compiled)
    return States(compiled) if BEAM in names else None
