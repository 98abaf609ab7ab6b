"""The graphs' inputs, from requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.pruning import PruningPlan
from vtexport.runtime.request import Decoding, Request
from vtexport.targets.engine import Engine, PrefillInput, VisionInput, VisionOutput


def look(engine: Engine, plan: PruningPlan, requests: Sequence[Request]) -> VisionOutput:
    """The vision graph of `plan` on the images of `requests`."""
    pixels = np.stack([request.views.pixels for request in requests])
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    pruned = rows and plan.vision_stage is not None
    return engine.vision(
        VisionInput(
            pixels[:, 0] if plan.views == 1 else pixels,
            np.stack([row.sequence for row in rows]) if rows else None,
            np.stack([row.row_start for row in rows]) if pruned else None,
            extras=_extras(plan, "vision", requests),
        )
    )


def vision_extras(plan: PruningPlan) -> list[str]:
    """The names of the inputs that the methods of `plan` need in the vision graph besides images."""
    return _extra_names(plan, "vision")


def _extra_names(plan: PruningPlan, graph: str) -> list[str]:
    return [extra.name for part in plan.methods.parts for extra in part.extras if extra.graph == graph]


def _extras(plan: PruningPlan, graph: str, requests: Sequence[Request]) -> dict[str, Array]:
    """The inputs of `graph` that the methods of `plan` need besides images and prompts, stacked over the batch."""
    names = _extra_names(plan, graph)
    return {name: np.stack([request.extras[name] for request in requests]) for name in names}


def admit(engine: Engine, requests: Sequence[Request], decoding: Decoding) -> None:
    """Refuse requests that together exceed what `engine` was built for; see `Engine.admit`."""
    longest = max(len(request.prompt.token_ids) for request in requests)
    engine.admit(len(requests), longest, decoding.max_new_tokens)


def visual_lengths(plan: PruningPlan, vision: VisionOutput, requests: Sequence[Request]) -> Array:
    """How many visual tokens of each image reach the decoder, [B, n] int64."""
    if vision.visual_length is not None:
        return vision.visual_length
    rows = [request.views.rows for request in requests if request.views.rows is not None]
    if rows:
        return np.stack([row.length for row in rows])
    images = len(requests[0].prompt.image_positions)
    lengths: Array = np.full((len(requests), images), plan.vision_tokens // images, dtype=np.int64)
    return lengths


def prefill_input(
    plan: PruningPlan, requests: Sequence[Request], vision: VisionOutput, bucket: int = 0
) -> PrefillInput:
    """The prompts of `requests` with their visual tokens, for the graph of `plan`, number `bucket`."""
    lengths = np.array([len(request.prompt.token_ids) for request in requests], dtype=np.int64)
    input_ids = np.zeros((len(requests), int(lengths.max())), dtype=np.int64)
    for row, request in enumerate(requests):
        input_ids[row, : lengths[row]] = request.prompt.token_ids
    at = np.array([request.prompt.image_positions for request in requests], dtype=np.int64)
    several = at.shape[1] > 1
    return PrefillInput(
        input_ids,
        at if several else at[:, 0],
        lengths,
        vision.seen(bucket).visual,
        visual_lengths(plan, vision, requests) if several or plan.newlines else None,
        extras=_extras(plan, "prefill", requests),
    )
