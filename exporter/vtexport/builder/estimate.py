"""Estimates what a build takes, from the model's geometry alone."""

from __future__ import annotations

from dataclasses import dataclass

from vtexport.builder.engines import EngineSpec
from vtexport.builder.selfcheck import checks_in_full, memory_needed
from vtexport.models import ModelSpec
from vtexport.models.spec import ITEMSIZE
from vtexport.targets import Target

# Measured on LLaVA-1.5-7B and 13B: bytes of ONNX per layer, and the memory that tracing takes besides the weights.
_GRAPH_BYTES = {"vision": 55_000, "decoder": 40_000}
_TRACING = 850_000_000


@dataclass(frozen=True)
class Estimate:
    """The estimate of a build.

    Attributes:
        spec, engines, target: what it would be made from and for.
        converts: whether weights would be converted to another dtype than the checkpoint's.
    """

    spec: ModelSpec
    engines: EngineSpec
    target: Target
    converts: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all graphs, each counted once."""
        return self.spec.weight_bytes(self.engines.dtype)

    @property
    def graph_bytes(self) -> int:
        """Approximate bytes of the ONNX files."""
        vision, decoder = self.spec.vision.feature_layer, self.spec.decoder.num_layers
        return _GRAPH_BYTES["vision"] * vision + _GRAPH_BYTES["decoder"] * decoder

    @property
    def checked_in_full(self) -> bool:
        """Whether the self-check would run the model itself on this machine."""
        return checks_in_full(self.spec, self.engines.dtype, self.target)

    @property
    def peak_memory(self) -> int:
        """Approximate peak resident bytes of the build."""
        d = self.spec.decoder
        largest = d.vocab_size * d.hidden_size * (ITEMSIZE[self.engines.dtype] + 4) if self.converts else 0
        check = memory_needed(self.spec, self.engines.dtype) if self.checked_in_full else 0
        return _TRACING + max(largest, check)


def config_dtype(spec: ModelSpec) -> str:
    """The safetensors dtype of a checkpoint, according to its config.json."""
    text = spec.config.get("text_config", {})
    names = [place.get(key) for place in (spec.config, text) for key in ("dtype", "torch_dtype")]
    known = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    return next((known[name] for name in names if name in known), "F32")
