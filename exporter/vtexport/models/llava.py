"""The family `llava`: LLaVA-1.5 and similar models, one view per image."""

from __future__ import annotations

from vtexport.models.family import Family


class Llava(Family):
    """CLIP (or SigLIP), a two-layer projector, Llama; every image is one view of the tower."""

    model_type = "llava"
