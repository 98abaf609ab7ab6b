"""Turns prompts with images, or with visual tokens made elsewhere, into what TensorRT-LLM's executor takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensorrt_llm.inputs import BaseMultimodalInputProcessor, InputProcessor

from vtexport.errors import InputError
from vtexport.models.prompt import Prompter
from vtexport.models.views import Views
from vtexport.targets.tensorrt_llm.torch_model.description import Description
from vtexport.targets.tensorrt_llm.torch_model.stages import Images

#: the name under which a request's data say where its images stand (`Images`)
LAYOUT = "vtexport"


class VtexportInputProcessor(BaseMultimodalInputProcessor, InputProcessor):  # type: ignore[misc]  # no types of theirs
    """The input processor that a bundle registers; a subclass has the bundle's `description` (`register`)."""

    description: ClassVar[Description]

    def __init__(
        self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(
            model_path=model_path, config=config, tokenizer=tokenizer, trust_remote_code=trust_remote_code, **kwargs
        )
        self._prompter = Prompter(Path(model_path), self.description.spec)
        self._words = self._prompter.tokenizer if tokenizer is None else tokenizer
        # Hashes of images serve the reuse of blocks alone, which is off.
        self._multimodal_hashing_supported = False

    @property
    def processor(self) -> Any:
        """The checkpoint's image processor."""
        return self._prompter.image_processor

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._words

    @property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of pixels."""
        return torch.float32

    def get_vocab_size(self) -> int:
        """The size of the language model's vocabulary."""
        return self.description.spec.decoder.vocab_size

    def get_num_tokens_per_image(self, *, image: Any, **kwargs: Any) -> int:
        """Visual tokens of an image that enter the decoder."""
        return self._counts(None)[0]

    def get_mm_token_ids(self) -> torch.Tensor:
        """The ids of visual tokens."""
        return torch.tensor([self._mark])

    def __call__(self, inputs: Mapping[str, Any], sampling_params: Any) -> tuple[list[int], dict[str, Any] | None]:
        """Token ids and data of a prompt, with the images in `multi_modal_data`.

        Raises:
            InputError: another number of images than the bundle was built for, or than the prompt has marks.
        """
        images = [_pictures(one) for one in (inputs.get("multi_modal_data") or {}).get(self._modality) or []]
        ids = self._tokenized(inputs)
        if not images:
            if self._mark in ids:
                raise InputError(
                    f"the prompt has a {self._prompter.mark} mark but no image came with it; send the image"
                )
            return ids, {}
        self._refuse_images()
        views = self._prompter.views(images if len(images) > 1 else images[0])
        data: dict[str, Any] = {"pixel_values": torch.from_numpy(views.pixels)}
        if views.rows is not None:
            data |= {
                "sequence": torch.from_numpy(views.rows.sequence),
                "row_start": torch.from_numpy(views.rows.row_start),
            }
        return self._expanded(ids, self._counts(views), {"image": data})

    def attach_multimodal_embeddings(
        self,
        inputs: Mapping[str, Any],
        multimodal_embedding: Mapping[str, Sequence[torch.Tensor]],
        sampling_params: Any,
    ) -> tuple[list[int], dict[str, Any]]:
        """Token ids and data of a prompt whose visual tokens [K, C] each were made by `vtexport.targets.tensorrt_llm`.

        Raises:
            InputError: tensors of another number or shape than the bundle's plans have.
        """
        spec, tensors = self.description.spec, list(multimodal_embedding.get("image", ()))
        if len(tensors) != spec.views.images:
            raise InputError(f"{len(tensors)} embeddings came, the bundle was built for {spec.views.images} per prompt")
        for tensor in tensors:
            if tensor.ndim != 2 or tensor.shape[1] != spec.decoder.hidden_size:
                raise InputError(
                    f"embeddings of shape {tuple(tensor.shape)} came, the model takes [tokens, {spec.decoder.hidden_size}]"
                )
        counts = [len(tensor) for tensor in tensors]
        allowed = sorted({plan.vision_tokens for plan in self.description.plans})
        total = sum(counts)
        if not (total <= allowed[-1] if spec.views.newlines else total in allowed):
            raise InputError(
                f"{total} visual tokens came, the bundle's plan has {' or '.join(map(str, allowed))}; make them with "
                "vtexport.targets.tensorrt_llm.prompts and this bundle"
            )
        return self._expanded(self._tokenized(inputs), counts, {"multimodal_embedding": torch.cat(tensors)})

    @property
    def _mark(self) -> int:
        return self.description.spec.image_token_id

    @property
    def _modality(self) -> str:
        return "video" if self.description.spec.views.has_frames else "image"

    def _tokenized(self, inputs: Mapping[str, Any]) -> list[int]:
        if inputs.get("prompt") is None:
            return [int(token) for token in inputs["prompt_token_ids"]]
        return [int(token) for token in self._words(inputs["prompt"])["input_ids"]]

    def _refuse_images(self) -> None:
        """Refuse images where only `prompts` of `vtexport.targets.tensorrt_llm` can make their visual tokens."""
        plan = self.description.plan
        if len(self.description.plans) > 1:
            raise InputError(
                "this bundle chooses a keep ratio by what an image shows, after its prompt was laid out; send embeddings "
                "made by vtexport.targets.tensorrt_llm.prompts"
            )
        if plan.methods.vision.extras:
            raise InputError(
                f"method {plan.method} reads the question, which TensorRT-LLM does not hand on; send embeddings made by "
                "vtexport.targets.tensorrt_llm.prompts"
            )

    def _counts(self, views: Views | None) -> list[int]:
        """Visual tokens of each image that enter the decoder."""
        plan, images = self.description.plan, self.description.spec.views.images
        if views is not None and views.rows is not None:
            return [int(count) for count in views.rows.length]
        return [plan.vision_tokens // images] * images

    def _expanded(
        self, ids: list[int], counts: Sequence[int], data: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        """`ids` with a placeholder per visual token, and `data` with the place of each image."""
        marks = ids.count(self._mark)
        if marks != len(counts):
            raise InputError(
                f"the prompt has {marks} {self._prompter.mark} marks for {len(counts)} images; give one each"
            )
        expanded: list[int] = []
        places, left, text = [], iter(counts), 0
        for token in ids:
            if token == self._mark:
                places.append(text)
                # The mark's own id: one outside the vocabulary could reach the embedding in a batch's padding.
                expanded += [self._mark] * next(left)
            else:
                expanded.append(token)
                text += 1
        layout = vars(Images(tuple(places), tuple(counts), text))
        return expanded, {"multimodal_data": {**data, LAYOUT: {name: _plain(value) for name, value in layout.items()}}}


def _pictures(given: Any) -> Any:
    """An image, or the frames of a video, which versions of TensorRT-LLM wrap differently."""
    return list(given.frames) if hasattr(given, "frames") else given


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
