"""KV caches of batches, whatever holds them: OpenVINO's own state, or blocks of shared arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtexport.arrays import Array


@dataclass(kw_only=True, eq=False)
class BatchCache(ABC):
    """The KV cache of a batch, as `vtexport.targets.engine.Cache`.

    Attributes:
        request: the inference request that runs the batch.
        given: the inputs of its prompts, or what decoding needs of these.
        ranking: see `vtexport.targets.engine.Cache`.
    """

    request: Any
    given: Mapping[str, Array] = field(default_factory=dict)
    ranking: Array | None = None

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    def broken_layer(self, row: int) -> int | None:
        """See `vtexport.targets.engine.Cache`; blocks and states are the plugin's to read."""
        return None

    @abstractmethod
    def feeds(self, length: Array) -> Mapping[str, Any]:
        """The inputs of the next call that have to do with the cache.

        Args:
            length: [N, B] int64, tokens in each layer's cache of each row before the call; zeros for whole prompts.
        """

    @abstractmethod
    def retain(self, rows: Array) -> None:
        """Let only `rows` [B'] of the batch go on."""

    @abstractmethod
    def join(self, other: BatchCache) -> bool:
        """Let the rows of `other` go on behind those of this batch; whether that is possible."""


class Caches(ABC):
    """The caches of a compiled language model."""

    @abstractmethod
    def start(self, rows: int, places: Sequence[int]) -> BatchCache:
        """An empty cache for `rows` prompts, with room for `places[i]` tokens per row in layer i."""
