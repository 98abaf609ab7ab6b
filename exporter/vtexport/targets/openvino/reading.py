"""An ONNX file of a bundle as OpenVINO's model: `vtexport.nn` nodes become its own ops, caches its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov
from openvino.frontend import FrontEndManager
from openvino.frontend.onnx import ConversionExtension

from vtexport.graph.domains import NN
from vtexport.targets.openvino.attention import Caches
from vtexport.targets.openvino.lowering import OWN
from vtexport.targets.openvino.parts import Heads, attention, compressed_product, rms_norm, rotary, shared


class _Conversion:
    """The conversion of one graph."""

    def __init__(self) -> None:
        self.heads = Heads()
        self.caches = Caches(self.heads)

    def extensions(self) -> list[Any]:
        """What tells OpenVINO's reader about the ops of the domain `vtexport.nn`."""
        converters = {
            (NN, "RMSNorm"): self._norm,
            (NN, "Rotary"): self._rotary,
            (NN, "FullAttention"): self._full,
            (NN, "CausalAttention"): self._causal,
            (OWN, "StatefulAttention"): self.caches.attend,
            (OWN, "CompressedProduct"): self._product,
        }
        return [ConversionExtension(name, domain, converter) for (domain, name), converter in converters.items()]

    def _norm(self, context: Any) -> list[Any]:
        x, weight = context.get_input(0), context.get_input(1)
        return [rms_norm(x, weight, context.get_attribute("epsilon")).output(0)]

    def _rotary(self, context: Any) -> list[Any]:
        x, positions, cos, sin = (context.get_input(number) for number in range(4))
        return [rotary(self.heads, x, positions, (cos, sin), context.get_attribute("num_heads")).output(0)]

    def _full(self, context: Any) -> list[Any]:
        count = context.get_attribute("num_heads")
        query, key, value = (self.heads.split(context.get_input(number), count) for number in range(3))
        return [self.heads.merge(attention(query, key, value, context.get_attribute("scale"))).output(0)]

    def _product(self, context: Any) -> list[Any]:
        x, levels, zero_points, scales = (context.get_input(number) for number in range(4))
        sizes = (context.get_attribute(name) for name in ("bits", "rows", "columns"))
        return [compressed_product(x, levels, zero_points, scales, *sizes).output(0)]

    def _causal(self, context: Any) -> list[Any]:
        count, groups = context.get_attribute("num_heads"), context.get_attribute("kv_heads")
        query = self.heads.split(context.get_input(0), count)
        key, value = (self.heads.split(context.get_input(number), groups) for number in (1, 2))
        keys, values = (shared(part, groups, count) for part in (key, value))
        mixed = attention(query, keys, values, context.get_attribute("scale"), causal=True)
        return [self.heads.merge(mixed).output(0), *(part.output(0) for part in (key, value))]


def read_model(path: Path) -> Any:
    """The model in the ONNX file `path`; its weights stay in the files that it points to, mapped into memory."""
    conversion = _Conversion()
    frontend = FrontEndManager().load_by_framework("onnx")
    for extension in conversion.extensions():
        frontend.add_extension(extension)
    model = frontend.convert(frontend.load(str(path)))
    sinks = conversion.caches.sinks
    return ov.Model(model.get_results(), sinks, model.get_parameters(), path.stem) if sinks else model
