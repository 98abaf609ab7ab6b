"""The optimisation profile of each graph: between which shapes its inputs may vary, and where they usually lie."""

from __future__ import annotations

from typing import Any

from vtexport.targets.base import CompileJob, prefill_names


def profile_shapes(job: CompileJob, name: str) -> dict[str, tuple[Any, Any, Any]]:
    """Smallest, usual and largest shape of every input of graph `name`; text and batch by the job's options."""
    names = {value.name for value in job.models[name].graph.inputs}
    batch, text = int(job.options["max_batch"]), int(job.options["max_text"])
    d = job.spec.decoder
    usual_text = min(48, text)

    def shapes(*axes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        low, usual, high = zip(*axes, strict=True)
        return low, usual, high

    def fixed(extent: int) -> tuple[int, int, int]:
        return extent, extent, extent

    rows = (1, 1, batch)
    if name == "vision":
        from vtexport.graph.export import vision_extents

        extents = vision_extents(job.spec)
        return {port: shapes(rows, *map(fixed, own)) for port, own in extents.items() if port in names}
    if name != "decode":
        images = job.spec.views.images
        plan = job.plans[prefill_names(len(job.plans)).index(name)]
        inputs = {
            "input_ids": shapes(rows, (1, usual_text, text)),
            "image_position": shapes(rows) if images == 1 else shapes(rows, fixed(images)),
            "text_length": shapes(rows),
            "visual": shapes(rows, fixed(plan.vision_tokens), fixed(d.hidden_size)),
        }
        if "ranking" in names:
            inputs["ranking"] = shapes(rows, fixed(plan.vision_tokens))
        if "visual_length" in names:
            inputs["visual_length"] = shapes(rows, fixed(images))
        return inputs
    from vtexport.graph.graphs import cache_names

    layers = fixed(d.num_layers)
    inputs = {"input_ids": shapes(rows, fixed(1)), "length": shapes(layers, rows), "position": shapes(layers, rows)}
    if "image_position" in names:
        inputs["image_position"] = shapes(rows)
    for number, cache in enumerate(cache_names("past", d.num_layers)):
        visual = max(plan.per_layer[number // 2] for plan in job.plans)
        room = min(visual + text, d.max_positions)
        usual = min(visual + min(128, text), room)
        inputs[cache] = shapes(rows, fixed(d.num_kv_heads), (1, usual, room), fixed(d.head_size))
    return inputs
