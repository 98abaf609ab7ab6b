"""Inputs that a method's graphs take besides images and prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from vtexport.arrays import Array
    from vtexport.models.spec import ModelSpec
    from vtexport.pruning.plan import PruningPlan


class Extra(ABC):
    """An input that a method adds to the vision or the prefill graph, with one row per prompt of a batch."""

    #: the input's name
    name: ClassVar[str]
    #: which graph has it
    graph: ClassVar[Literal["vision", "prefill"]]
    dtype: ClassVar[Literal["int64", "float32"]]

    @abstractmethod
    def shape(self, spec: ModelSpec, plan: PruningPlan) -> tuple[int, ...]:
        """The input's shape without the batch axis."""

    def of_questions(self, processor: Path, spec: ModelSpec) -> Callable[[str], Array] | None:
        """A function from a question to the input, made from processor files; None if another bundle gives it."""
        return None
