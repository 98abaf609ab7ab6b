"""The optimisation profile of each graph: the smallest, usual and largest shapes of its inputs."""

from __future__ import annotations

from typing import Any

from vtexport.targets.base import CompileJob

#: usual number of text tokens in a prompt, and of text and answer tokens in a cache
_PROMPT, _CACHE = 48, 128


def profile_shapes(
    job: CompileJob, name: str, max_batch: int, max_text: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Smallest, usual and largest shape of every input of graph `name`.

    The traced graph says which extents are fixed and what the others are: `batch`, `text`, or `capacity_i`, the room in
    the cache of decoder layer i.

    Args:
        job: what is compiled.
        name: one of its graphs.
        max_batch: prompts per batch at most.
        max_text: text tokens per prompt, and of prompt and answer together, at most.
    """

    def between(extent: Any) -> tuple[int, int, int]:
        if isinstance(extent, int):
            return extent, extent, extent
        axis, _, layer = str(extent.value).partition("_")
        if axis == "batch":
            return 1, 1, max_batch
        if axis == "text":
            return 1, min(_PROMPT, max_text), max_text
        assert axis == "capacity", f"graph {name} has an extent of no known kind: {extent.value}"
        visual = max(plan.per_layer[int(layer)] for plan in job.plans)
        room = min(visual + max_text, job.spec.decoder.max_positions)
        return 1, min(visual + min(_CACHE, max_text), room), room

    shapes = {}
    for value in job.models[name].graph.inputs:
        assert value.name is not None, "inputs have names"
        assert value.shape is not None, "traced graphs have shapes"
        low, usual, high = zip(*(between(extent) for extent in value.shape), strict=True)
        shapes[value.name] = (low, usual, high)
    return shapes
