"""Runs what a bundle computes before TensorRT-LLM does, through PyTorch, with vtexport's CUDA kernels on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtexport.arrays import Array
from vtexport.errors import BundleError, InputError
from vtexport.targets.base import ENGINE_FOLDER
from vtexport.targets.engine import (
    Cache,
    LayerTimes,
    PrefillInput,
    PrefillOutput,
    Selected,
    VisionInput,
    VisionOutput,
)
from vtexport.targets.tensorrt_llm.torch_model.description import Description

if TYPE_CHECKING:
    from vtexport.graph.select import SelectGraph
    from vtexport.graph.vision import VisionGraph

_NO_LANGUAGE_MODEL = "this bundle has no language model, which TensorRT-LLM runs; see docs/tensorrt-llm.md"


class TorchEngine:
    """The vision stage of a bundle and, if it has one, the graph that chooses tokens; there is no language model.

    Args:
        folder: the bundle; weights are read when they are first used.
        graphs: the names of its graphs.
        threads: threads of PyTorch; 0 leaves the number to it.

    Raises:
        BundleError: the bundle is damaged.
    """

    def __init__(self, folder: Path, graphs: Sequence[str], threads: int) -> None:
        self._folder, self._names, self._threads = folder, graphs, threads
        self._description = Description.read(folder)
        self._graphs: dict[str, Any] = {}
        self._times: dict[str, float] = {}

    def load(self) -> None:
        for name in self._names:
            self._graph(name)

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        """PyTorch takes batches of any size."""

    def vision(self, inputs: VisionInput) -> VisionOutput:
        return VisionOutput(self._run("vision", inputs.feeds()))

    def select(self, inputs: PrefillInput) -> Selected:
        outputs = self._run("select", inputs.feeds())
        return Selected(outputs["chosen"], outputs["kept"], outputs.get("chosen_length"))

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        raise InputError(_NO_LANGUAGE_MODEL)

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        raise InputError(_NO_LANGUAGE_MODEL)

    def retain(self, cache: Cache, rows: Array) -> bool:
        raise InputError(_NO_LANGUAGE_MODEL)

    def join(self, cache: Cache, other: Cache) -> bool:
        raise InputError(_NO_LANGUAGE_MODEL)

    def device_times(self) -> Mapping[str, float]:
        return self._times

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        call()
        return {}

    def _run(self, name: str, given: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of graph `name` by their names."""
        import torch

        graph = self._graph(name)
        device = next(graph.parameters()).device
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = graph(*(torch.from_numpy(given[one]).to(device) for one in graph.input_names()))
            arrays = {one: tensor.cpu().numpy() for one, tensor in zip(graph.output_names(), outputs, strict=True)}
        if device.type == "cuda":
            self._times[name] = 1000 * (time.perf_counter() - start)
        return arrays

    def _graph(self, name: str) -> VisionGraph | SelectGraph:
        """The module of graph `name` with its weights."""
        if name in self._graphs:
            return self._graphs[name]  # type: ignore[no-any-return]
        import torch

        from vtexport.graph.eager import DTYPES, fill, of_dtype
        from vtexport.graph.select import SelectGraph
        from vtexport.graph.vision import VisionGraph

        if self._threads:
            torch.set_num_threads(self._threads)
        told = self._description
        graph: VisionGraph | SelectGraph
        with of_dtype(DTYPES[told.dtype]):
            if name == "vision":
                graph = VisionGraph(told.spec, told.plans, told.debug)
            else:
                graph = SelectGraph(told.spec, told.plan)
        fill(graph, _tensors(self._folder), {})
        self._graphs[name] = graph.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return graph


def _tensors(folder: Path) -> dict[str, Any]:
    """The tensors in a bundle's engine folder by name, each read when it is sliced."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Any] = {}
    for path in sorted((folder / ENGINE_FOLDER).glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path} is damaged ({error}); build the bundle again") from error
        found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found
