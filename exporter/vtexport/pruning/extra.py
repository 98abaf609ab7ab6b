"""What a method asks of its graphs' callers besides images and prompts."""

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
    """An input that the vision or the prefill graph has for one method's sake; a row for every prompt of a batch."""

    #: the input's name
    name: ClassVar[str]
    #: which graph has it
    graph: ClassVar[Literal["vision", "prefill"]]
    dtype: ClassVar[Literal["int64", "float32"]]

    @abstractmethod
    def shape(self, spec: ModelSpec, plan: PruningPlan) -> tuple[int, ...]:
        """Its extents, the batch left out."""

    def of_questions(self, processor: Path, spec: ModelSpec) -> Callable[[str], Array] | None:
        """What makes it of a question, with a bundle's processor files; None if another bundle has to give it."""
        return None
