"""Input processors: their base, where they are registered, and how they are made and called."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..logger import logger
from .data import TextPrompt
from .multimodal import MultimodalInput

ExtraProcessedInputs = dict[str, Any]


class InputProcessor(Protocol):
    """Makes token ids of a prompt."""

    model_path: Any
    config: Any
    tokenizer: Any

    def __call__(self, inputs: TextPrompt, sampling_params: Any) -> tuple[list[int], ExtraProcessedInputs | None]: ...


class DefaultInputProcessor(InputProcessor):
    """Text alone."""

    def __init__(self, model_path: Any, config: Any, tokenizer: Any, trust_remote_code: bool = True) -> None:
        self.tokenizer, self.config, self.model_path = tokenizer, config, model_path
        self.multimodal_hashing_supported = None

    def __call__(self, inputs: TextPrompt, sampling_params: Any) -> tuple[list[int], ExtraProcessedInputs | None]:
        return self.tokenizer.encode(inputs["prompt"], add_special_tokens=sampling_params.add_special_tokens), None


class BaseMultimodalInputProcessor(ABC):
    """What processors of images have in common."""

    def __init__(
        self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._config, self._model_path, self._tokenizer = config, model_path, tokenizer
        self._use_fast = kwargs.get("use_fast", True)
        self._multimodal_hashing_supported: bool | None = None

    def attach_multimodal_embeddings(
        self, inputs: TextPrompt, multimodal_embedding: dict[str, list[torch.Tensor]], sampling_params: Any
    ) -> tuple[list[int], ExtraProcessedInputs | None]:
        """As a call, for images that come as embeddings."""
        raise NotImplementedError("this input processor takes no embeddings")

    @property
    @abstractmethod
    def processor(self) -> Any:
        """The checkpoint's processor."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._tokenizer

    @property
    @abstractmethod
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self._config

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The model's dtype."""

    @abstractmethod
    def __call__(self, inputs: TextPrompt, sampling_params: Any) -> tuple[list[int], ExtraProcessedInputs | None]: ...

    @property
    def use_fast(self) -> bool:
        """Whether the checkpoint's fast processor is wanted."""
        return self._use_fast

    @property
    def multimodal_hashing_supported(self) -> bool | None:
        """Whether images can be hashed; None: not tried yet."""
        return self._multimodal_hashing_supported

    @multimodal_hashing_supported.setter
    def multimodal_hashing_supported(self, value: bool | None) -> None:
        self._multimodal_hashing_supported = value

    def get_vocab_size(self) -> int | None:
        """How many tokens there are; ids from there on stand for visual tokens."""
        for source in (self.config, self.tokenizer):
            if hasattr(source, "vocab_size"):
                return int(source.vocab_size)
        return None

    def get_mm_token_ids(self) -> torch.Tensor | None:
        """The ids of visual tokens."""
        return getattr(self.processor, "mm_token_ids", None)

    def get_mm_special_token_ids(self) -> torch.Tensor | None:
        """The ids of tokens among visual ones that are embedded as text."""
        return getattr(self.processor, "mm_special_token_ids", None)

    @property
    def get_num_multimodal_tokens(self) -> Callable[..., Any]:
        """The count of transformers."""
        return self.processor._get_num_multimodal_tokens

    def get_num_tokens_per_image(self, *, image: Any, **kwargs: Any) -> int:
        """How many tokens `image` becomes."""
        return self.get_num_multimodal_tokens([(image.height, image.width)], **kwargs)["num_image_tokens"][0]

    def get_num_tokens_per_video(self, *, video: list[Any], **kwargs: Any) -> int:
        """How many tokens `video` becomes."""
        return self.get_num_tokens_per_image(image=video[0], **kwargs) * len(video)


class MultimodalPlaceholderPlacement(enum.Enum):
    """Where marks of images go in a prompt without any."""

    INVALID = -1
    BEFORE_TEXT = 0
    AFTER_TEXT = 1


@dataclass(frozen=True)
class MultimodalPlaceholderMetadata:
    """The marks by modality, and where they go."""

    placeholder_map: dict[str, str] = field(default_factory=dict)
    placeholder_placement: MultimodalPlaceholderPlacement = MultimodalPlaceholderPlacement.AFTER_TEXT
    placeholders_separator: str = "\n"


class _PlaceholderRegistry:
    def __init__(self) -> None:
        self._multimodal_placeholder_by_model_type: dict[str, MultimodalPlaceholderMetadata] = {}

    def set_placeholder_metadata(self, model_type: str, placeholder_metadata: MultimodalPlaceholderMetadata) -> None:
        """Remember the marks of `model_type`."""
        self._multimodal_placeholder_by_model_type[model_type] = placeholder_metadata

    def get_placeholder_metadata(self, model_type: str) -> MultimodalPlaceholderMetadata:
        """The marks of `model_type`."""
        return self._multimodal_placeholder_by_model_type[model_type]


class _ProcessorRegistry:
    def __init__(self) -> None:
        self._input_processors_cls_by_model_type: dict[type, type] = {}


MULTIMODAL_PLACEHOLDER_REGISTRY = _PlaceholderRegistry()
INPUT_PROCESSOR_REGISTRY = _ProcessorRegistry()


def register_input_processor(
    processor_cls: type, model_type: str, placeholder_metadata: MultimodalPlaceholderMetadata = None
) -> Callable[[type], type]:
    """Decorates a model's class: `processor_cls` reads its prompts, and `model_type` has these marks."""

    def wrapper(model_cls: type) -> type:
        if placeholder_metadata is None:
            raise ValueError("placeholder_metadata is missing")
        INPUT_PROCESSOR_REGISTRY._input_processors_cls_by_model_type[model_cls] = processor_cls
        MULTIMODAL_PLACEHOLDER_REGISTRY.set_placeholder_metadata(model_type, placeholder_metadata)
        processor_cls._registered_model_type = model_type
        return model_cls

    return wrapper


def create_input_processor(model_path_or_dir: str, tokenizer: Any, checkpoint_format: str | None = "HF") -> Any:
    """The input processor of a checkpoint: its model's own, or the one for text."""
    from transformers import AutoConfig

    from .._torch.models.modeling_utils import MODEL_CLASS_MAPPING

    config = AutoConfig.from_pretrained(model_path_or_dir)
    model = MODEL_CLASS_MAPPING.get((config.architectures or [None])[0])
    own = INPUT_PROCESSOR_REGISTRY._input_processors_cls_by_model_type.get(model)
    if own is not None:
        return own(model_path_or_dir, config, tokenizer, trust_remote_code=True)
    return DefaultInputProcessor(None, None, tokenizer)


def create_input_processor_with_hash(input_processor: Any, hash_lib: Any = None) -> Callable[..., Any]:
    """`input_processor`, tried with hashes of images first: what fails once is never tried again."""

    def hashed(inputs: TextPrompt, sampling_params: Any) -> tuple[list[int], ExtraProcessedInputs | None]:
        tokens, extra = input_processor(inputs, sampling_params)
        ((modality, items),) = inputs["multi_modal_data"].items()
        count = input_processor.get_num_tokens_per_image if modality == "image" else None
        lengths = [count(image=item) for item in items]
        ids, vocabulary = input_processor.get_mm_token_ids(), input_processor.get_vocab_size()
        row = torch.tensor(tokens)
        visual = row >= vocabulary if ids is None else torch.isin(row, ids.to(row.dtype))
        places = torch.where(visual)[0].tolist()
        if len(places) != sum(lengths):
            raise ValueError(f"{len(places)} visual tokens, but {sum(lengths)} were expected")
        positions = [places[sum(lengths[:number])] for number in range(len(lengths))]
        hashes = [[number] * 8 for number in range(len(lengths))]
        extra["multimodal_input"] = MultimodalInput(hashes, positions, lengths)
        return tokens, extra

    def call(inputs: TextPrompt, sampling_params: Any) -> tuple[list[int], ExtraProcessedInputs | None]:
        modalities = list(inputs.get("multi_modal_data") or {})
        supported = input_processor.multimodal_hashing_supported if modalities else False
        if len(modalities) != 1 or modalities[0] not in ("image", "video") or supported is False:
            return input_processor(inputs, sampling_params)
        try:
            result = hashed(inputs, sampling_params)
        except Exception as error:
            if supported:
                raise
            logger.warning(f"no hashing: {error}")
            input_processor.multimodal_hashing_supported = False
            return input_processor(inputs, sampling_params)
        input_processor.multimodal_hashing_supported = True
        return result

    return call
