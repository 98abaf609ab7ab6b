"""The interface of engines: what an opened bundle computes, with NumPy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vtexport.arrays import Array
from vtexport.errors import BundleError

#: milliseconds of each graph's layers by their names, over all its calls
LayerTimes = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Seen:
    """The vision graph's outputs for one plan: visual [B, K, C]; kept [B, K'] int32 or None.

    An engine may leave `visual` on its device, as an object that has a shape, can be indexed, and becomes an array by
    `np.asarray`.
    """

    visual: Array
    kept: Array | None


@dataclass(frozen=True)
class VisionOutput:
    """The vision graph's outputs by name (`vtexport.graph.vision.VisionGraph`); the first axis is the batch."""

    arrays: Mapping[str, Array]

    def seen(self, bucket: int = 0) -> Seen:
        """The outputs for plan number `bucket`."""
        suffix, shared = f".{bucket}", self.arrays.get("visual")
        if shared is not None:
            return Seen(shared, self.arrays.get("kept"))
        return Seen(output(self.arrays, "visual" + suffix), self.arrays.get("kept" + suffix))

    @property
    def score(self) -> Array | None:
        """Scores [B, V], in a debug build with a vision-stage method that rates."""
        return self.arrays.get("score")

    @property
    def visual_length(self) -> Array | None:
        """Visual tokens of each image among the K, [B, n]; None unless they depend on the image's size."""
        return self.arrays.get("visual_length")

    @property
    def spread(self) -> Array:
        """How many patches share CLS's attention, [B] fp32; only in a build with several plans."""
        return output(self.arrays, "spread")

    def rows(self, rows: Array) -> VisionOutput:
        """The outputs for the given rows of the batch."""
        return VisionOutput({name: array[rows] for name, array in self.arrays.items()})


def output(arrays: Mapping[str, Array], name: str) -> Array:
    """The output `name` of a graph.

    Raises:
        BundleError: the graph has no such output, so that it is another than the manifest describes.
    """
    if name not in arrays:
        raise BundleError(f"a graph of this bundle gives no {name}; build the bundle again")
    return arrays[name]


@dataclass(frozen=True, kw_only=True)
class _Input:
    """The inputs of a graph; an input that the graph does not have is None.

    Attributes:
        extras: further inputs of the plan's method (`vtexport.pruning.extra`), by name, [B, …] each.
    """

    extras: Mapping[str, Array] = field(default_factory=dict)

    def feeds(self) -> dict[str, Array]:
        """The graph's inputs by name."""
        present = {name: array for name, array in vars(self).items() if name != "extras" and array is not None}
        return {**present, **self.extras}


@dataclass(frozen=True)
class VisionInput(_Input):
    """The inputs of the vision graph (`vtexport.graph.vision.VisionGraph`).

    Attributes:
        pixel_values: fp32 [B, 3, S, S], or [B, T, 3, S, S] with several views per prompt.
        sequence: [B, V] int64, if the visual sequence is laid out by rows (`vtexport.models.views.Rows`).
        row_start: [B, V] int64, if such a sequence is pruned.
    """

    pixel_values: Array
    sequence: Array | None = None
    row_start: Array | None = None


@dataclass(frozen=True)
class PrefillInput(_Input):
    """The inputs of the prefill graph.

    Attributes:
        input_ids: [B, L] int64, the prompts without their images, padded on the right.
        image_position: int64 [B], text tokens before the image, or [B, n] with n images per prompt.
        text_length: [B] int64, text tokens of each prompt.
        visual: [B, K, C], the vision graph's output.
        visual_length: [B, n] int64, visual tokens of each image, if rows differ in that or have several images.
    """

    input_ids: Array
    image_position: Array
    text_length: Array
    visual: Array
    visual_length: Array | None = None


@dataclass(frozen=True)
class PrefillOutput:
    """The outputs of the prefill graph.

    Attributes:
        logits: [B, vocabulary] fp32 of each row's last token.
        cache: the KV cache, with room for further tokens.
        stages: the outputs of the decoder stages, by name (`vtexport.graph.graphs.PrefillGraph`): kept.i; in a debug
            build also score.i, cluster.i and raters; ranking if the build gives it.
    """

    logits: Array
    cache: Cache
    stages: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """The outputs of the graph that chooses visual tokens (`vtexport.graph.select.SelectGraph`).

    Attributes:
        chosen: [B, K, C], the embeddings of the chosen tokens.
        kept: [B, K] int32, their indices among the tokens that entered; -1 behind those of a row that has fewer.
        length: [B, n] int64, chosen tokens of each image, if rows differ in that or have several images.
    """

    chosen: Array
    kept: Array
    length: Array | None


class Selector(Protocol):
    """An engine whose bundle has that graph."""

    def select(self, inputs: PrefillInput) -> Selected:
        """Choose visual tokens for a language model elsewhere."""
        ...


class Cache(Protocol):
    """A batch's KV cache, owned by the runtime that made it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def ranking(self) -> Array | None:
        """The attention to each visual token in the last decode step, [B, V]; None unless the build gives it."""
        ...

    def broken_layer(self, row: int) -> int | None:
        """The first layer whose keys or values of `row` are NaN or infinite; None if there is none, or it is unknown."""
        ...


class Engine(Protocol):
    """An opened bundle, NumPy in and out: vision, prefill and decode."""

    def load(self) -> None:
        """Load all graphs now rather than at their first call, so that no call's time includes it."""
        ...

    def admit(self, rows: int, text: int, new_tokens: int) -> None:
        """Refuse a batch that the engine was not built for, before anything of it runs.

        Args:
            rows: prompts.
            text: text tokens of the longest prompt.
            new_tokens: tokens per answer at most.

        Raises:
            InputError: the batch exceeds a limit; the message says how to build for it.
        """
        ...

    def vision(self, inputs: VisionInput) -> VisionOutput:
        """The vision graph."""
        ...

    def prefill(self, inputs: PrefillInput, new_tokens: int, bucket: int = 0) -> PrefillOutput:
        """The prefill graph of plan number `bucket`; the cache gets room for `new_tokens` more tokens."""
        ...

    def decode(self, cache: Cache, tokens: Array, length: Array, position: Array) -> Array:
        """Logits [B, vocabulary] after one more token per row.

        Args:
            cache: what `prefill` gave, updated in place.
            tokens: [B] int64.
            length: [N, B] int64, tokens in each layer's cache of each row before this one.
            position: [N, B] int64, the token's position in each layer.
        """
        ...

    def retain(self, cache: Cache, rows: Array) -> bool:
        """Let only some rows of a batch go on, so that every later `decode` is of these alone.

        Args:
            cache: what `prefill` gave, updated in place; its memory shrinks at once or in the next `decode`.
            rows: [B'] int64, ascending indices of rows of the batch as it is now.

        Returns:
            whether the batch has these rows only; an engine may keep it as it is.
        """
        ...

    def join(self, cache: Cache, other: Cache) -> bool:
        """Let the rows of another batch go on behind those of a batch, so that every later `decode` is of both.

        Args:
            cache: what `prefill` gave, updated in place.
            other: the same, of a batch of its own, which is not used again.

        Returns:
            whether they go on together; an engine may be unable to, and then leaves both as they are.
        """
        ...

    def device_times(self) -> Mapping[str, float]:
        """Milliseconds of each graph's last call on the device itself; empty where the runtime is on the CPU."""
        ...

    def layer_times(self, call: Callable[[], None]) -> LayerTimes:
        """Run `call`, which uses this engine, under the runtime's own profiler."""
        ...
