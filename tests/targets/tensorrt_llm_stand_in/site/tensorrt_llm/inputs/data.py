"""What a caller gives."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text, with what belongs to its marks."""

    prompt: str
    multi_modal_data: NotRequired[dict[str, Any] | None]
    multi_modal_embeddings: NotRequired[dict[str, Any] | None]
    multi_modal_uuids: NotRequired[dict[str, list[str | None]] | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]
    query: NotRequired[str]
