"""Whether a manifest says of the model what the model's own configuration says."""

from __future__ import annotations

from vtexport.bundle.manifest import Manifest
from vtexport.models.spec import ModelSpec
from vtexport.pruning.geometry import Geometry
from vtexport.targets import Target


def disagreement(manifest: Manifest, spec: ModelSpec, target: Target) -> str | None:
    """What of `manifest` is not as in `spec`, read from the bundle's processor/config.json; None if all is.

    A plan for another model would index outside its arrays, and an end token of another vocabulary never comes.
    """
    model, views, geometry = manifest.model, manifest.model.views, Geometry.of(spec)
    said = {
        "family": (model.family, spec.family),
        "config": (model.config, spec.config),
        "image_token_id": (model.image_token_id, spec.image_token_id),
        "eos_token_ids": (tuple(model.eos_token_ids), spec.eos_token_ids),
        "image_size": (model.image_size, spec.vision.image_size),
        "grid": (model.grid, spec.vision.grid),
        "vocabulary": (model.vocabulary, spec.decoder.vocab_size),
        "max_positions": (model.max_positions, spec.decoder.max_positions),
        "images": (views.images, spec.views.images),
        "views": (views.views, spec.views.views),
        "tiles": (None if views.tiles is None else tuple(views.tiles), spec.views.tiles),
        "newlines": (views.newlines, spec.views.newlines),
    }
    for plan in manifest.plans:
        of_plan = (plan.num_visual_tokens, plan.num_layers, plan.leading, plan.views, plan.newlines)
        of_model = (geometry.tokens, geometry.layers, geometry.leading, geometry.views, geometry.newlines)
        said |= {"plan": (of_plan, of_model)}
        if of_plan != of_model:
            break
    for name, (told, known) in said.items():
        if told != known:
            return f"its {name} is not that of processor/config.json"
    if manifest.target.dtype not in target.dtypes:
        return f"target {target.name} has no dtype {manifest.target.dtype!r}"
    return None
