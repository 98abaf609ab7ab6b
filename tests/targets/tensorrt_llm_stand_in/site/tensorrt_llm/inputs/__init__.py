"""From prompts to token ids and tensors."""

from .data import TextPrompt
from .multimodal import MultimodalInput, MultimodalParams, MultimodalRuntimeData
from .registry import (
    INPUT_PROCESSOR_REGISTRY,
    MULTIMODAL_PLACEHOLDER_REGISTRY,
    BaseMultimodalInputProcessor,
    ExtraProcessedInputs,
    InputProcessor,
    MultimodalPlaceholderMetadata,
    MultimodalPlaceholderPlacement,
    create_input_processor,
    create_input_processor_with_hash,
    register_input_processor,
)

__all__ = [
    "INPUT_PROCESSOR_REGISTRY",
    "MULTIMODAL_PLACEHOLDER_REGISTRY",
    "BaseMultimodalInputProcessor",
    "ExtraProcessedInputs",
    "InputProcessor",
    "MultimodalInput",
    "MultimodalParams",
    "MultimodalPlaceholderMetadata",
    "MultimodalPlaceholderPlacement",
    "MultimodalRuntimeData",
    "TextPrompt",
    "create_input_processor",
    "create_input_processor_with_hash",
    "register_input_processor",
]
