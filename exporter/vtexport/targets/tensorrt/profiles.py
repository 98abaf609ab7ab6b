"""The optimisation profiles of each graph: the smallest, usual and largest shapes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtexport.pruning.decoder import slots
from vtexport.targets.base import CompileJob
from vtexport.targets.language import LANGUAGE

#: input -> its smallest, usual and largest shape
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
#: usual number of text tokens in a prompt
_PROMPT = 48


@dataclass(frozen=True)
class Limits:
    """What a bundle is built for: prompts per batch, and text tokens per prompt and its answer, at most."""

    max_batch: int
    max_text: int


def profiles_of(job: CompileJob, name: str, limits: Limits) -> list[Profile]:
    """The profiles of graph `name`: one, but for the language graph one per plan's prefill, and the last for decode.

    The traced graph says which extents are fixed and what the others are: `batch`, `text`, `visual`, or a number of
    slots.
    """
    inputs = job.models[name].graph.inputs
    if name != LANGUAGE:
        return [_profile(inputs, {"batch": (1, 1, limits.max_batch)})]
    batch, text = (1, 1, limits.max_batch), (1, min(_PROMPT, limits.max_text), limits.max_text)
    prefills: list[dict[str, tuple[int, int, int]]] = [
        {
            "batch": batch,
            "text": text,
            "visual": _fixed(plan.vision_tokens),
            **{slot: _fixed(length) for slot, length in slots(job.plans, plan).items()},
        }
        for plan in job.plans
    ]
    decode = {**dict.fromkeys(prefills[0], _fixed(0)), "batch": batch, "text": _fixed(1)}
    return [_profile(inputs, extents) for extents in (*prefills, decode)]


def _fixed(number: int) -> tuple[int, int, int]:
    return number, number, number


def _profile(inputs: Sequence[Any], extents: Mapping[str, tuple[int, int, int]]) -> Profile:
    """The profile in which each named extent of `inputs` has its smallest, usual and largest value of `extents`."""
    shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {}
    for value in inputs:
        sizes = [_fixed(size) if isinstance(size, int) else extents[str(size.value)] for size in value.shape]
        low, usual, high = zip(*sizes, strict=True)
        shapes[value.name] = (low, usual, high)
    return shapes
