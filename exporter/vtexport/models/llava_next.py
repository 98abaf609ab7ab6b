"""The family `llava_next`: LLaVA-1.6, any resolution (Vicuna, Mistral, Llama 3)."""

from __future__ import annotations

from vtexport.models.anyres import Anyres


class LlavaNext(Anyres):
    """CLIP on a base view and tiles; every image of a prompt is tiled."""

    model_type = "llava_next"
