"""The interface of targets: how a bundle is compiled for a runtime, and how it is opened there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vtexport.options import Option
from vtexport.targets.engine import Engine

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme

#: the folder of a bundle that holds graphs and the weights that they point into
ENGINE_FOLDER = "engine"


@dataclass(frozen=True)
class Availability:
    """Whether something works on this machine; `reason` says why not and what to do, or names what was found."""

    works: bool
    reason: str


@dataclass(frozen=True)
class CompileJob:
    """The input of `Target.compile`.

    Attributes:
        folder: the bundle under construction; graphs and weights lie in `engine/`.
        models: the traced graphs by name, weights attached.
        spec, plans, dtype: what they were traced from.
        processor: the folder of the model's processor files.
        report: called with (line, steps) when a piece of work begins; steps None if unknown.
        advance: called with the number of steps done.
        warn: called with a runtime's own warnings and errors.
    """

    folder: Path
    models: Mapping[str, ir.Model]
    spec: ModelSpec
    plans: Sequence[PruningPlan]
    dtype: str
    processor: Path
    report: Callable[[str, int | None], None]
    advance: Callable[[int], None]
    warn: Callable[[str], None]


@dataclass(frozen=True)
class Compiled:
    """The result of `Target.compile`: files by graph, relative to the bundle; versions and facts for the manifest."""

    files: Mapping[str, str]
    versions: Mapping[str, str]
    facts: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(ABC):
    """A runtime to compile for, with its options.

    To add one, write a subclass in a folder of its own, as a frozen dataclass whose annotated fields are its options
    (`vtexport.options`), and list it in `vtexport.targets.TARGETS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    #: whether the language model is left to another program, so that there is only a vision graph
    vision_only: ClassVar[bool] = False

    @property
    def weights_inside(self) -> bool:
        """Whether its engines hold their weights, rather than point to them."""
        return False

    @property
    def selects(self) -> bool:
        """Whether the decoder's first layers choose visual tokens for that program (`vtexport.graph.select`)."""
        return False

    @property
    def largest_batch(self) -> int | None:
        """Prompts per batch at most; None if any number will do."""
        return None

    @property
    def cache_room(self) -> int | None:
        """Text places of each layer's cache, besides its visual tokens; None for caches of any capacity."""
        return None

    @abstractmethod
    def can_build(self) -> Availability:
        """Whether this machine can compile for it."""

    def can_run(self) -> Availability:
        """Whether this machine can run what was compiled for it."""
        return self.can_build()

    def check_given(self, given: Collection[str]) -> None:  # noqa: B027 - not every target has something to refuse
        """Refuse options, of those named in `given`, that have no effect with the others.

        Raises:
            InputError: an option has no effect.
        """

    def check(self) -> None:  # noqa: B027 - as above
        """Refuse options that do not work on this machine or with each other.

        Raises:
            InputError: an option does not work; the message says what to do about it.
        """

    def planned(self, plans: Sequence[PruningPlan]) -> Sequence[PruningPlan]:
        """The plans that a bundle for this target follows, made of those that were asked for.

        Raises:
            InputError: there is no such plan.
        """
        return plans

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:  # noqa: B027 - as above
        """Refuse plans that the target does not support.

        Raises:
            InputError: a plan is not supported.
        """

    def scheme(self) -> Scheme | None:
        """The quantisation of the decoder's linear layers; None to leave their weights as they are."""
        return None

    @abstractmethod
    def compile(self, job: CompileJob) -> Compiled:
        """Turn the graphs of `job` into what the runtime loads, in `job.folder`.

        Raises:
            TargetError: the runtime refuses them.
        """

    def finish(self, folder: Path, compiled: Compiled) -> None:  # noqa: B027 - as above
        """Remove from the bundle the files that only compiling and the self-check needed."""

    @abstractmethod
    def open(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan], threads: int) -> Engine:
        """Open what was compiled from `plans`; `threads` 0 leaves the number to the runtime.

        Raises:
            TargetError: it was compiled for another version or device than this machine has.
        """

    def open_exact(self, folder: Path, compiled: Compiled, plans: Sequence[PruningPlan]) -> Engine:
        """As `open`, for the self-check: activations are not rounded to 8 bits (`Scheme.rounds_activations`)."""
        return self.open(folder, compiled, plans, 0)
