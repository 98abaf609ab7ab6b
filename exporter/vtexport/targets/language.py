"""Prefill and decode as calls of the language graph (`vtexport.graph.language`), for every runtime that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import slots
from vtexport.targets.engine import Cache, PrefillInput, PrefillOutput, output

LANGUAGE = "language"
#: the inputs that every step has of its own
_OF_EVERY_STEP = ("input_ids", "text_length", "length", "position")


class LanguageCalls:
    """The inputs of the language graph that is shared by `plans`, apart from caches."""

    def __init__(self, plans: Sequence[PruningPlan]) -> None:
        self._plans = plans

    def prefill(self, inputs: PrefillInput, bucket: int) -> dict[str, Array]:
        """The inputs for whole prompts behind empty caches, with the counts of plan number `bucket`."""
        plan = self._plans[bucket]
        nothing: Array = np.zeros((plan.num_layers, len(inputs.input_ids)), dtype=np.int64)
        return {**inputs.feeds(), "length": nothing, "position": nothing, **self._slots(plan)}

    def decode(self, prompt: Mapping[str, Array], tokens: Array, length: Array, position: Array) -> dict[str, Array]:
        """The inputs for one more token per row.

        Args:
            prompt: what `prefill` gave for these rows; the new token comes without any visual one.
            tokens: [B] int64.
            length: [N, B] int64, tokens in each layer's cache of each row before this one.
            position: [N, B] int64, the token's position in each layer.
        """
        given: dict[str, Array] = {
            "input_ids": tokens[:, None],
            "text_length": np.ones(len(tokens), dtype=np.int64),
            "length": length,
            "position": position,
        }
        for name, array in prompt.items():
            if name == "image_position":
                given[name] = array
            elif name == "visual_length":
                given[name] = np.zeros_like(array)
            elif name not in given:
                given[name] = _without_visual(array)
        return given

    def retained(self, prompt: Mapping[str, Array], rows: Array) -> dict[str, Array]:
        """What `decode` needs of `prompt` when only `rows` [B'] of its batch go on; the visual tokens are not in it."""
        kept = {}
        for name, array in prompt.items():
            if name in ("image_position", "visual_length"):
                kept[name] = array[rows]
            elif name not in _OF_EVERY_STEP:
                rest = _without_visual(array)
                kept[name] = rest if rest.ndim == 1 else rest[rows]
        return kept

    def joined(self, prompt: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
        """What `decode` needs when the rows of `other` stand behind those of `prompt`."""
        both = [self.retained(one, np.arange(len(one["image_position"]))) for one in (prompt, other)]
        return {
            name: array if array.ndim == 1 and name != "image_position" else np.concatenate([array, both[1][name]])
            for name, array in both[0].items()
        }

    def prefilled(self, outputs: Mapping[str, Array], cache: Cache, bucket: int) -> PrefillOutput:
        """What prefill of plan number `bucket` gave: the graph's outputs, and the cache that it filled.

        Raises:
            BundleError: the graph gives no logits.
        """
        others = {name: array for name, array in outputs.items() if name != "logits"}
        return PrefillOutput(output(outputs, "logits"), cache, self._stages(others, bucket))

    def _stages(self, outputs: Mapping[str, Array], bucket: int) -> dict[str, Array]:
        """Of the outputs of stages, those of plan number `bucket`; others may have further stages."""
        own = self._plans[bucket].decoder_stages
        found = {}
        for name, array in outputs.items():
            kind, _, layer = name.partition(".")
            stage = own.get(int(layer)) if layer else None
            if not layer or (stage is not None and stage.carried and (kind != "cluster" or stage.recycled)):
                found[name] = array
        return found

    def _slots(self, plan: PruningPlan) -> dict[str, Array]:
        return {name: np.zeros(length, dtype=np.int32) for name, length in slots(self._plans, plan).items()}


def _without_visual(array: Array) -> Array:
    """An input that has an entry per visual token, [B, V, …] or slots [V], where there is no such token."""
    empty: Array = array[:0] if array.ndim == 1 else array[:, :0]
    return empty
