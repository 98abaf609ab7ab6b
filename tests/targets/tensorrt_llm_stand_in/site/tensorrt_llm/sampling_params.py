"""How tokens are chosen: the most probable one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that input processors read."""

    end_id: int | None = None
    max_tokens: int = 32
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool = False
    n: int = 1
