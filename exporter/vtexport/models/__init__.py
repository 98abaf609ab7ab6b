"""Reads checkpoints: geometry from config.json, weights from safetensors, prompts from its processor."""

from vtexport.models.checkpoint import Checkpoint
from vtexport.models.families import read_spec
from vtexport.models.prompt import Prompt, Prompter
from vtexport.models.resolve import recipe_names, resolve_model
from vtexport.models.spec import DecoderSpec, ModelSpec, VisionSpec

__all__ = [
    "Checkpoint",
    "DecoderSpec",
    "ModelSpec",
    "Prompt",
    "Prompter",
    "VisionSpec",
    "read_spec",
    "recipe_names",
    "resolve_model",
]
