"""Runs a bundle's vision stage through PyTorch, with vtexport's CUDA kernels where there is a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtexport.arrays import Array
from vtexport.errors import BundleError, InputError
from vtexport.targets.base import ENGINE_FOLDER
from vtexport.targets.engine import Cache, LayerTimes, PrefillInput, PrefillOutput, VisionInput, VisionOutput
from vtexport.targets.tensorrt_llm.torch_model.description import Description

if TYPE_CHECKING:
    from vtexport.graph.vision import VisionGraph


class TorchVision:
    """The vision stage of a bundle as an `Engine`; there is no language model."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Open the bundle in `folder`; weights are read when they are first used.

        Raises:
            BundleError: the bundle is damaged.
        """
        self._folder, self._threads = folder, threads
        self._description = Description.read(folder)
        self._graph: VisionGraph | None = None
        self._times: dict[str, float] = {}

    def load(self) -> None:
        self._loaded()

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        """PyTorch takes batches of any size."""

    def vision(self, inputs: VisionInput) -> VisionOutput:
        import torch

        graph = self._loaded()
        device, given = next(graph.parameters()).device, inputs.feeds()
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = graph(*(torch.from_numpy(given[name]).to(device) for name in graph.input_names()))
            arrays = {name: tensor.cpu().numpy() for name, tensor in zip(graph.output_names(), outputs, strict=True)}
        if device.type == "cuda":
            self._times["vision"] = 1000 * (time.perf_counter() - start)
        return VisionOutput(arrays)

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        raise InputError("this bundle has no language model, which TensorRT-LLM runs; use its serve.sh")

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        raise InputError("this bundle has no language model, which TensorRT-LLM runs; use its serve.sh")

    def device_times(self) -> Mapping[str, float]:
        return self._times

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        call()
        return {}

    def _loaded(self) -> VisionGraph:
        if self._graph is not None:
            return self._graph
        import torch

        from vtexport.graph.eager import DTYPES, fill, of_dtype
        from vtexport.graph.vision import VisionGraph

        if self._threads:
            torch.set_num_threads(self._threads)
        described = self._description
        with of_dtype(DTYPES[described.dtype]):
            graph = VisionGraph(described.spec, described.plans, described.debug)
        fill(graph, _tensors(self._folder), {})
        self._graph = graph.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return self._graph


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
