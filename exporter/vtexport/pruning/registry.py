"""The table of all methods; a new method is added here."""

from __future__ import annotations

from collections.abc import Mapping

from vtexport.errors import InputError
from vtexport.options import flag_of, option_fields, parse_options
from vtexport.pruning.cdpruner import CDPruner
from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.dense import Dense
from vtexport.pruning.divprune import DivPrune
from vtexport.pruning.exit import Exit
from vtexport.pruning.fastervlm import FasterVLM
from vtexport.pruning.fastv import FastV
from vtexport.pruning.method import Combination, Method, MethodChoice
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

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Dense,
        SparseVLM,
        SparseVLMPlus,
        FastV,
        PyramidDrop,
        Exit,
        SGL,
        FasterVLM,
        VTCCls,
        VisPruner,
        VisionZip,
        DivPrune,
        CDPruner,
        Random,
        Pool,
    )
}
DEFAULT_METHOD = SparseVLM.name


def parts_of(name: str) -> tuple[type[VisionMethod], type[DecoderMethod] | None]:
    """The vision-stage and the decoder-stage method that `name` names: one method alone, or one of each as `a+b`.

    Raises:
        InputError: an unknown method, or two that cannot be combined.
    """
    parts = name.split("+")
    for part in parts:
        if part not in METHODS:
            raise InputError(f"unknown method {part!r}; choose one of {', '.join(METHODS)}")
    named = [METHODS[part] for part in parts]
    vision = [method for method in named if issubclass(method, VisionMethod)]
    decoder = [method for method in named if issubclass(method, DecoderMethod)]
    if len(named) == 1:
        return (vision[0], None) if vision else (Dense, decoder[0])
    if len(vision) != 1 or len(decoder) != 1 or vision[0] is Dense or named[0] is not vision[0]:
        raise InputError(
            f"--method {name} cannot be combined; give one vision-stage method, then one decoder-stage method, such "
            f"as {FasterVLM.name}+{SparseVLM.name}"
        )
    return vision[0], decoder[0]


def choose(name: str, given: Mapping[str, object], *, resolved: bool = False) -> MethodChoice:
    """The methods that `name` names, with the options in `given`; options not given have their defaults.

    Args:
        name: see `parts_of`.
        given: values by option name.
        resolved: whether `given` comes from a plan, which also holds the options that only a build fills in.

    Raises:
        InputError: as `parts_of`; or an option that no part has, or a value that the option cannot have.
    """
    vision, decoder = parts_of(name)
    combined = decoder is not None and vision is not Dense
    owners: list[type] = [vision, *([] if decoder is None else [decoder]), *([Combination] if combined else [])]
    for option in given:
        declared = [option_fields(owner)[option] for owner in owners if option in option_fields(owner)]
        if not declared or (declared[0].extra.get("resolved") and not resolved):
            raise InputError(f"{flag_of(option)} has no effect with method {name}; leave it out")
    by_owner = [{key: given[key] for key in given if key in option_fields(owner)} for owner in owners]
    choice = MethodChoice(
        vision.parse(by_owner[0]),
        None if decoder is None else decoder.parse(by_owner[1]),
        parse_options(Combination, by_owner[2], f"method {name}") if combined else None,
    )
    if not resolved:
        # A plan lists every option, so the options that a user gave can no longer be told from defaults.
        for part in choice.parts:
            part.check_given(given)
    return choice
