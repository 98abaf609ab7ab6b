"""What a target is: how a bundle is compiled for a runtime, and how that runtime is opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from vtexport.arrays import Array
from vtexport.options import Option

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.quantize import Scheme

#: milliseconds of each graph's layers by their names, over all its calls
LayerTimes = Mapping[str, Mapping[str, float]]
#: the folder of a bundle where graphs lie, and the weights that they point into
ENGINE_FOLDER = "engine"


@dataclass(frozen=True)
class Availability:
    """Whether something works on this machine; `reason` says why not and what to do, or names what was found."""

    works: bool
    reason: str


@dataclass(frozen=True)
class Seen:
    """What the vision graph gives the prefill graph of one plan: visual [B, K, C]; kept [B, K'] int32 or None."""

    visual: Array
    kept: Array | None


@dataclass(frozen=True)
class VisionOutput:
    """The vision graph's outputs by name (`vtexport.graph.graphs.VisionGraph`), rows of a batch in front."""

    arrays: Mapping[str, Array]

    def seen(self, bucket: int = 0) -> Seen:
        """What plan number `bucket` works on."""
        own, shared = f".{bucket}", self.arrays.get("visual")
        if shared is not None:
            return Seen(shared, self.arrays.get("kept"))
        return Seen(self.arrays["visual" + own], self.arrays.get("kept" + own))

    @property
    def score(self) -> Array | None:
        """Scores [B, V] of a debug build of a vision-stage method that rates."""
        return self.arrays.get("score")

    @property
    def visual_length(self) -> Array | None:
        """Visual tokens of each image among the K, [B, n]; None unless they depend on the image's size."""
        return self.arrays.get("visual_length")

    @property
    def spread(self) -> Array:
        """How many patches share CLS's attention, [B] fp32; of a build with several plans."""
        return self.arrays["spread"]

    def rows(self, rows: Array) -> VisionOutput:
        """The same of some rows of the batch."""
        return VisionOutput({name: array[rows] for name, array in self.arrays.items()})


@dataclass(frozen=True, kw_only=True)
class _Input:
    """A graph's inputs; one that the graph does not have is None.

    Attributes:
        extras: what the plan's method has besides (`vtexport.pruning.extra`), by name, [B, …] each.
    """

    extras: Mapping[str, Array] = field(default_factory=dict)

    def feeds(self) -> dict[str, Array]:
        """The graph's inputs by name."""
        own = {name: array for name, array in vars(self).items() if name != "extras" and array is not None}
        return {**own, **self.extras}


@dataclass(frozen=True)
class VisionInput(_Input):
    """What the vision graph takes (`vtexport.graph.graphs.VisionGraph`).

    Attributes:
        pixel_values: [B, 3, S, S] fp32, of several views a prompt [B, T, 3, S, S].
        sequence: [B, V] int64, for a sequence laid out by rows.
        row_start: [B, V] int64, for one that is pruned.
    """

    pixel_values: Array
    sequence: Array | None = None
    row_start: Array | None = None


@dataclass(frozen=True)
class PrefillInput(_Input):
    """What prefill takes.

    Attributes:
        input_ids: [B, L] int64, the prompts without their images, padded on the right.
        image_position: [B] int64, text tokens before the image; of n images a prompt [B, n].
        text_length: [B] int64, text tokens of each prompt.
        visual: [B, K, C], what the vision graph gave.
        visual_length: [B, n] int64, visual tokens of each image, where rows differ in that or have several.
    """

    input_ids: Array
    image_position: Array
    text_length: Array
    visual: Array
    visual_length: Array | None = None


@dataclass(frozen=True)
class PrefillOutput:
    """What prefill gives.

    Attributes:
        logits: [B, vocabulary] fp32 of each row's last token.
        cache: the KV cache, with room for further tokens.
        stages: what the decoder stages give out, by name (`vtexport.graph.graphs.PrefillGraph`): kept.i, and of a
            debug build score.i, cluster.i and raters; ranking if built to give it.
    """

    logits: Array
    cache: Cache
    stages: Mapping[str, Array] = field(default_factory=dict)


class Cache(Protocol):
    """A batch's KV cache, owned by the runtime that made it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def ranking(self) -> Array | None:
        """Of the last decode step, [B, V] attention to each visual token; None unless built to give it."""
        ...


class Engine(Protocol):
    """An opened bundle: three calls, NumPy in and out."""

    def load(self) -> None:
        """Load all graphs now rather than at their first call, so that no call's time includes it."""
        ...

    def vision(self, inputs: VisionInput) -> VisionOutput:
        """The vision graph."""
        ...

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        """The prefill graph of plan number `bucket`; the cache gets room for `new_tokens` tokens more."""
        ...

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        """Logits [B, vocabulary] after one more token a row.

        Args:
            cache: what `prefill` gave, updated in place.
            tokens: [B] int64.
            length: [N, B] int64, tokens in each layer's cache of each row before this one.
            position: [N, B] int64, the token's position in each layer.
        """
        ...

    def device_times(self) -> Mapping[str, float]:
        """Milliseconds of each graph's last call on the device itself; empty where the runtime is on the CPU."""
        ...

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        """Run `call`, which uses this engine, under the runtime's own profiler."""
        ...


@dataclass(frozen=True)
class CompileJob:
    """What a target gets to compile.

    Attributes:
        folder: the bundle under construction; graphs and weights lie in `engine/`.
        models: the traced graphs by name, weights attached.
        spec, plans, dtype: what they were traced from.
        report: called with (line, steps) when a piece of work begins; steps None if unknown.
        advance: called with steps done.
        warn: called with a runtime's own warnings and errors.
    """

    folder: Path
    models: Mapping[str, ir.Model]
    spec: ModelSpec
    plans: Sequence[PruningPlan]
    dtype: str
    report: Callable[[str, int | None], None]
    advance: Callable[[int], None]
    warn: Callable[[str], None]


@dataclass(frozen=True)
class Compiled:
    """What a target made: files by graph, relative to the bundle, and what of this machine the manifest keeps."""

    files: Mapping[str, str]
    versions: Mapping[str, str]
    facts: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(ABC):
    """A runtime to compile for, with its options.

    To add one: a subclass in a folder of its own, a frozen dataclass whose annotated fields are its options
    (`vtexport.options`), listed in `vtexport.targets.TARGETS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    #: whether its engines hold their weights, rather than point at them
    weights_inside: ClassVar[bool] = False
    #: whether the language model is left to another program, so that there is a vision graph alone
    vision_only: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def can_build(cls) -> Availability:
        """Whether this machine can compile for it."""

    @classmethod
    def can_run(cls) -> Availability:
        """Whether this machine can run what was compiled for it."""
        return cls.can_build()

    def check(self) -> None:  # noqa: B027 - not every target has something to refuse
        """Refuse options that this machine or each other do not allow.

        Raises:
            InputError: an option, with what to do about it.
        """

    def check_plans(self, spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:  # noqa: B027 - as above
        """Refuse plans that the target has no place for.

        Raises:
            InputError: one of them.
        """

    def scheme(self) -> Scheme | None:
        """How the weights of the decoder's linear layers are held; None for as they are."""
        return None

    @abstractmethod
    def compile(self, job: CompileJob) -> Compiled:
        """Turn the graphs of `job` into what the runtime loads, in `job.folder`.

        Raises:
            TargetError: the runtime refuses them.
        """

    def finish(self, folder: Path, compiled: Compiled) -> None:  # noqa: B027 - as above
        """Remove from the bundle what only compiling and verifying needed."""

    @abstractmethod
    def open(self, folder: Path, compiled: Compiled, threads: int) -> Engine:
        """Open what was compiled; `threads` 0 leaves the number to the runtime.

        Raises:
            TargetError: it was compiled for another version or device than there is here.
        """


def prefill_names(plans: int) -> list[str]:
    """The names of the prefill graphs of so many plans."""
    return ["prefill"] if plans == 1 else [f"prefill-{bucket}" for bucket in range(plans)]


def prefill_name(graphs: Collection[str], bucket: int) -> str:
    """The name of the prefill graph of plan number `bucket` in a bundle of so many graphs: one vision, one decode."""
    return prefill_names(len(graphs) - 2)[bucket]


def graph_names(plans: int) -> list[str]:
    """The names of all graphs of a bundle with so many plans."""
    return ["vision", *prefill_names(plans), "decode"]
