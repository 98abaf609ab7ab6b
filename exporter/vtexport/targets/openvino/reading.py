"""An ONNX file of a bundle as OpenVINO's model: `vtexport.nn` nodes become its own ops, and caches get a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov
from openvino.frontend import FrontEndManager
from openvino.frontend.onnx import ConversionExtension

from vtexport.graph.domains import NN
from vtexport.targets.openvino.lowering import OWN
from vtexport.targets.openvino.pages import Paged
from vtexport.targets.openvino.parts import Heads, Inputs, attention, compressed_product, rms_norm, rotary, shared
from vtexport.targets.openvino.states import Variables


class _Conversion:
    """The conversion of one graph."""

    def __init__(self, pages: bool) -> None:
        self.heads, self.inputs = Heads(), Inputs()
        self.caches: Paged | Variables = Paged(self.inputs) if pages else Variables(self.heads, self.inputs)

    def extensions(self) -> list[Any]:
        """What tells OpenVINO's reader about the ops of the domain `vtexport.nn`."""
        converters = {
            (NN, "RMSNorm"): self._norm,
            (NN, "Rotary"): self._rotary,
            (NN, "FullAttention"): self._full,
            (NN, "CausalAttention"): self._causal,
            (OWN, "CachedAttention"): self.caches.attend,
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


def read_model(path: Path, pages: bool) -> Any:
    """The model in the ONNX file `path`; its weights stay in the files that it points to, mapped into memory.

    Args:
        path: the file.
        pages: whether caches may be blocks of shared arrays, which give no rankings; otherwise they are variables.
    """
    frontend = FrontEndManager().load_by_framework("onnx")
    loaded = frontend.load(str(path))
    ranks = any("ranking" in place.get_names() for place in loaded.get_outputs())
    conversion = _Conversion(pages and not ranks)
    for extension in conversion.extensions():
        frontend.add_extension(extension)
    model = frontend.convert(loaded)
    inputs = [*model.get_parameters(), *conversion.inputs.put()]
    return ov.Model(model.get_results(), conversion.caches.sinks, inputs, path.stem)
