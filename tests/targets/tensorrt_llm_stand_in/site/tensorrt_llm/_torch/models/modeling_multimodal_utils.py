"""Embeddings of images among those of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...inputs.multimodal import MultimodalParams
from ...logger import logger
from ..modules.embedding import Embedding

_KEY = "multimodal_embedding"


def get_multimodal_embeddings(
    encoder_forward_fn: Callable[..., list[torch.Tensor]],
    multimodal_params: list[MultimodalParams],
    encoder_kwargs: dict[str, Any] | None = None,
) -> list[torch.Tensor]:
    """Embeddings of all requests, of which those without any are encoded; kept with the request if it has hashes."""
    if not multimodal_params:
        return []
    bare = [one for one in multimodal_params if one.has_content() and one.multimodal_data.get(_KEY) is None]
    if bare:
        made = encoder_forward_fn(bare, **(encoder_kwargs or {}))
        if len(made) > 1:
            return made
        if bare[0].multimodal_runtime is None:
            # Those that came with embeddings are lost here, as they are in TensorRT-LLM.
            logger.warning("no multimodal runtime data: embeddings are not kept")
            return made
        lengths = [one.multimodal_runtime.total_mm_tokens_in_request for one in bare]
        assert sum(lengths) == len(made[0])
        for one, part in zip(bare, torch.split(made[0], lengths), strict=True):
            one.multimodal_data[_KEY] = part
    for one in multimodal_params:
        if isinstance(one.multimodal_data.get(_KEY), list):
            one.multimodal_data[_KEY] = torch.cat(one.multimodal_data[_KEY])
    return [torch.cat([one.multimodal_data[_KEY] for one in multimodal_params])]


def find_input_mm_embeds(
    mm_embeds: list[torch.Tensor], multimodal_params: list[MultimodalParams]
) -> list[torch.Tensor]:
    """The part of embeddings that this pass computes; all of it without runtime data."""
    if not multimodal_params or multimodal_params[0].multimodal_runtime is None:
        return mm_embeds
    parts, begin = [], 0
    for number, one in enumerate(multimodal_params):
        runtime = one.multimodal_runtime
        source = mm_embeds[0] if len(mm_embeds) == 1 else mm_embeds[number]
        first = begin + runtime.num_unseen_mm_tokens
        parts.append(source[first : first + runtime.num_mm_tokens_in_chunk])
        if len(mm_embeds) == 1:
            begin += runtime.total_mm_tokens_in_request
    return [torch.cat(parts)] if sum(map(len, parts)) else []


def filter_mm_token_from_input_ids(
    input_ids: torch.IntTensor, vocab_size: int, mm_token_ids: torch.IntTensor | None = None
) -> tuple[torch.IntTensor, torch.IntTensor]:
    """Places of text and of visual tokens: those of the given ids, or those past the vocabulary."""
    visual = input_ids >= vocab_size
    if mm_token_ids is not None:
        visual = torch.isin(input_ids, mm_token_ids.to(input_ids.dtype))
    return torch.where(~visual)[0], torch.where(visual)[0]


def fuse_input_embeds(
    embedding_layer: Embedding,
    input_ids: torch.IntTensor,
    mm_embeds: list[torch.Tensor],
    mm_token_ids: torch.IntTensor | None = None,
    text_token_indices: torch.IntTensor | None = None,
    mm_token_indices: torch.IntTensor | None = None,
    **kwargs: Any,
) -> tuple[torch.FloatTensor | None, torch.FloatTensor | None]:
    """Either the ids as they are, if there are no images, or embeddings of everything.

    Raises:
        ValueError: there are not as many visual tokens as embeddings.
    """
    if len(mm_embeds) == 0:
        return input_ids, None
    visual = torch.cat(mm_embeds)
    if text_token_indices is None or mm_token_indices is None:
        text_token_indices, mm_token_indices = filter_mm_token_from_input_ids(
            input_ids, embedding_layer.num_embeddings, mm_token_ids
        )
    if len(mm_token_indices) != len(visual):
        raise ValueError(f"{len(mm_token_indices)} visual tokens, but {len(visual)} embeddings")
    text = embedding_layer(input_ids[text_token_indices])
    fused = torch.empty(len(input_ids), visual.shape[-1], dtype=text.dtype)
    fused[text_token_indices] = text
    fused[mm_token_indices] = visual.to(fused.dtype)
    return None, fused
