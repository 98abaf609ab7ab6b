"""What checkpoints call their tensors, and a short name for a checkpoint's weights."""

from __future__ import annotations

import hashlib

from vtexport.models.checkpoint import Checkpoint

#: a prefix in our graphs -> prefixes in checkpoints, which differ between transformers' versions, newest first
PREFIXES: dict[str, tuple[str, ...]] = {
    # A Video-LLaVA has two towers; the one for videos is read.
    "vision.": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "video_tower.vision_model.",
        "video_tower.",
        "model.video_tower.vision_model.",
        "model.video_tower.",
    ),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "image_newline": ("image_newline", "model.image_newline", "language_model.model.image_newline"),
    "decoder.": ("language_model.model.", "model.language_model.", "model.language_model.model."),
    "head.": ("language_model.lm_head.", "lm_head."),
    # A CLIP checkpoint's own names, joined to LLaVA's under this prefix.
    "clip.": ("clip.",),
}


def fingerprint(checkpoint: Checkpoint) -> str:
    """A short name for this checkpoint's weights: a hash of all tensors' names and shapes and the final norm's values.

    Two fine-tunings of one model have different names. Only one small tensor is read.
    """
    digest = hashlib.sha256()
    for name, record in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {record.shape}".encode())
    norm = checkpoint.find(PREFIXES["decoder."], "norm.weight")
    with norm.path.open("rb") as file:
        file.seek(norm.start)
        digest.update(file.read(norm.end - norm.start))
    return digest.hexdigest()[:16]
