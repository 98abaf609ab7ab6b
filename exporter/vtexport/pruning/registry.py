"""The methods that there are; a new one is listed here."""

from __future__ import annotations

from vtexport.errors import InputError
from vtexport.pruning.cdpruner import CDPruner
from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.dense import Dense
from vtexport.pruning.divprune import DivPrune
from vtexport.pruning.exit import Exit
from vtexport.pruning.fastervlm import FasterVLM
from vtexport.pruning.fastv import FastV
from vtexport.pruning.method import Method
from vtexport.pruning.pool import Pool
from vtexport.pruning.pyramiddrop import PyramidDrop
from vtexport.pruning.random import Random
from vtexport.pruning.sgl import SGL
from vtexport.pruning.sparsevlm import SparseVLM
from vtexport.pruning.sparsevlm_plus import SparseVLMPlus
from vtexport.pruning.vision import VisionMethod
from vtexport.pruning.visionzip import VisionZip
from vtexport.pruning.vispruner import VisPruner
from vtexport.pruning.vtc_cls import VTCCls

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Dense(),
        SparseVLM(),
        SparseVLMPlus(),
        FastV(),
        PyramidDrop(),
        Exit(),
        SGL(),
        FasterVLM(),
        VTCCls(),
        VisPruner(),
        VisionZip(),
        DivPrune(),
        CDPruner(),
        Random(),
        Pool(),
    )
}
DEFAULT_METHOD = SparseVLM.name


def methods_of(name: str) -> tuple[VisionMethod, DecoderMethod | None]:
    """The vision-stage and the decoder-stage method that `name` says: one method, or one of each as `a+b`.

    Raises:
        InputError: an unknown method, or two that cannot be combined.
    """
    parts = name.split("+")
    for part in parts:
        if part not in METHODS:
            raise InputError(f"unknown method {part!r}; choose one of {', '.join(METHODS)}")
    found = [METHODS[part] for part in parts]
    vision = [method for method in found if isinstance(method, VisionMethod)]
    decoder = [method for method in found if isinstance(method, DecoderMethod)]
    dense = METHODS[Dense.name]
    assert isinstance(dense, VisionMethod)
    if len(found) == 1:
        return (vision[0], None) if vision else (dense, decoder[0])
    if len(vision) != 1 or len(decoder) != 1 or vision[0] is dense or found[0] is not vision[0]:
        raise InputError(
            f"--method {name} cannot be combined; give one vision-stage method, then one decoder-stage method, such "
            f"as {FasterVLM.name}+{SparseVLM.name}"
        )
    return vision[0], decoder[0]
