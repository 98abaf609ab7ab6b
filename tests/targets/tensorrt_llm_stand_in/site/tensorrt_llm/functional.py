"""Enumerations that TensorRT-LLM keeps among its graph functions."""

from __future__ import annotations

from enum import IntEnum


class _FromString(IntEnum):
    @classmethod
    def from_string(cls, s: str) -> _FromString:
        """The member called `s`.

        Raises:
            ValueError: there is none.
        """
        if s not in cls.__members__:
            raise ValueError(f"{cls.__name__} has no {s}")
        return cls[s]


class RotaryScalingType(_FromString):
    """How rotary frequencies are scaled."""

    none = 0
    linear = 1
    dynamic = 2
    longrope = 3
    llama3 = 4
    yarn = 5
    mrope = 6

    @classmethod
    def from_string(cls, s: str) -> _FromString:
        """As the base class; `default` means none."""
        return super().from_string("none" if s == "default" else s)


class PositionEmbeddingType(_FromString):
    """How positions enter a model."""

    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2
    long_rope = 3
    alibi = 4
    alibi_with_scale = 5
    relative = 6
    chatglm = 7
    yarn = 8
    mrope = 9
    deferred = 10

    def is_rope(self) -> bool:
        """Whether queries and keys are rotated; `yarn` is left out, as it is in TensorRT-LLM."""
        names = ("rope_gptj", "rope_gpt_neox", "long_rope", "mrope")
        return self.name in names

    def is_mrope(self) -> bool:
        """Whether positions have three parts."""
        return self is PositionEmbeddingType.mrope

    def is_deferred(self) -> bool:
        """Whether the model itself applies positions."""
        return self is PositionEmbeddingType.deferred


class AllReduceStrategy(IntEnum):
    """How sums over GPUs are made."""

    NCCL = 0
    AUTO = 3
