"""Language graphs on ONNX Runtime: how graphs that another target compiles are checked where it cannot run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtexport.arrays import Array
from vtexport.pruning import PruningPlan
from vtexport.targets.base import Compiled
from vtexport.targets.engine import Cache, Engine, PrefillInput, PrefillOutput
from vtexport.targets.language import LANGUAGE, LanguageCalls
from vtexport.targets.onnxruntime.session import OrtEngine
from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget


@dataclass(frozen=True)
class OnnxRuntimeCheck(OnnxRuntimeTarget):
    """ONNX Runtime with the graphs of another target: a language graph if that has `room` in one."""

    room: int | None = None

    @property
    def language_room(self) -> int | None:
        return self.room

    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        if self.room is None:
            return super().open(folder, compiled, plans, threads)
        return OrtLanguageEngine(folder, compiled.files, plans, threads)


@dataclass
class CheckedCache:
    """The caches of the language graph by the names of its inputs, and the inputs of the prompt that filled them."""

    past: dict[str, Array]
    prompt: Mapping[str, Array]
    ranking: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.past.values())


class OrtLanguageEngine(OrtEngine):
    """A vision graph and a language graph; every step copies the caches."""

    def __init__(self, folder: Path, files: Mapping[str, str], plans: Sequence[PruningPlan], threads: int = 0) -> None:
        super().__init__(folder, files, threads)
        self._calls = LanguageCalls(plans)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        prompt = self._calls.prefill(inputs, bucket)
        empty = {
            port.name: np.zeros((len(inputs.input_ids), *port.shape[1:]), _FLOATS[port.type])
            for port in self.session(LANGUAGE).get_inputs()
            if port.name.startswith("past.")
        }
        cache = CheckedCache(empty, prompt)
        outputs = self._run(cache, prompt)
        if "ranking" in outputs:
            cache.ranking = np.zeros_like(outputs["ranking"])
        return PrefillOutput(outputs.pop("logits"), cache, self._calls.stages(outputs, bucket))

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        assert isinstance(cache, CheckedCache)
        outputs = self._run(cache, self._calls.decode(cache.prompt, tokens, length, position))
        cache.ranking = outputs.get("ranking")
        return outputs["logits"]

    def _run(self, cache: CheckedCache, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; put its caches into `cache`, and return its other outputs."""
        session = self.session(LANGUAGE)
        names = [port.name for port in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feeds, **cache.past}), strict=True))
        cache.past = {name: outputs.pop(name.replace("past", "present")) for name in cache.past}
        return outputs


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
