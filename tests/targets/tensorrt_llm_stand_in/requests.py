"""What the server knows of a request; the attributes that models and resource managers see have TensorRT-LLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: the request that fills a batch up to the size of a recorded pass
CUDA_GRAPH_DUMMY_REQUEST_ID = (1 << 64) - 1


@dataclass(eq=False)
class LlmRequest:
    """A prompt with the tokens that were added to it."""

    py_request_id: int
    tokens: list[int]
    max_new_tokens: int
    py_multimodal_data: dict[str, Any] | None = None
    #: from the input processor's hashes, if it supports them
    multimodal_input: Any = None
    end_id: int | None = None
    is_dummy: bool = False
    is_cuda_graph_dummy: bool = False
    answer: list[int] = field(default_factory=list)
    finished: bool = False
    context_current_position: int = 0

    def __post_init__(self) -> None:
        """The prompt is what there is at first."""
        self.py_prompt_len = self.prompt_len = len(self.tokens)

    @property
    def request_id(self) -> int:
        """The same, as the C++ class has it."""
        return self.py_request_id

    @property
    def max_beam_num_tokens(self) -> int:
        """Tokens so far, the last of which is not in the cache yet."""
        return len(self.tokens)

    @property
    def in_context(self) -> bool:
        """Whether a part of the prompt is still to be computed."""
        return self.context_current_position < self.prompt_len

    def get_tokens(self, beam: int) -> list[int]:
        """All tokens."""
        return self.tokens

    def get_last_tokens(self, beam: int) -> int:
        """The newest token."""
        return self.tokens[-1]

    def pause(self) -> None:
        """Start again later: what was generated belongs to the prompt then. Images are kept."""
        self.prompt_len = len(self.tokens)
        # TensorRT-LLM sets the other length when a request comes in, and not again.
        self.context_current_position = 0
