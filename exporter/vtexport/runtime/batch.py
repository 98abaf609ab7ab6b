"""Prompts that have been prefilled and decode together, one token per row and step; rows may leave, and others join."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.pruning.plan import VISION, PruningPlan
from vtexport.runtime.inputs import prefill_input, visual_lengths
from vtexport.runtime.numeric import prefill_faults, step_faults
from vtexport.runtime.request import Decoding, Request, Result
from vtexport.targets.engine import Engine, PrefillOutput, VisionOutput


class Batch:
    """The rows of a KV cache, and where each of them stands.

    Creating it runs prefill.

    Args:
        engine: an opened engine.
        plan: the plan compiled into it, or into its prefill graph number `bucket`.
        requests: at least one.
        decoding: how far to go at most.
        vision: what the vision graph gave for them.
        bucket: the number of the plan.

    Raises:
        InputError: prompt, visual and new tokens together exceed the model's positions, or the method refuses a prompt.
    """

    def __init__(
        self,
        engine: Engine,
        plan: PruningPlan,
        requests: Sequence[Request],
        decoding: Decoding,
        vision: VisionOutput,
        bucket: int = 0,
    ) -> None:
        texts = np.array([len(request.prompt.token_ids) for request in requests], dtype=np.int64)
        filled = visual_lengths(plan, vision, requests).sum(axis=1)
        _check_positions(texts + filled, decoding)
        _check_prompts(plan, requests)
        self._engine = engine
        self.prefilled: PrefillOutput = engine.prefill(
            prefill_input(plan, requests, vision, bucket), decoding.max_new_tokens, bucket
        )
        #: logits [B, vocabulary] of each row's last token
        self.logits = self.prefilled.logits
        self.cache = self.prefilled.cache
        # Every layer's cache holds all text and the visual tokens that entered it.
        visual = np.array(plan.entering(filled.tolist()), dtype=np.int64)
        self._length: Array = texts[None] + visual
        self._ahead: Array = np.zeros_like(visual) if plan.positions == "compact" else filled - visual
        self._largest = 0
        #: what the graphs gave for each row besides tokens, by stage; before any row has left or joined
        self.results = [_result(row, vision, self.prefilled, bucket) for row in range(len(self))]
        #: what is wrong with each row's numbers, so that it has no answer; "" where nothing is
        self.faults = prefill_faults(plan, vision, bucket, filled, self.prefilled, self.results)
        self._steps: Array = np.zeros(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._length.shape[1])

    @property
    def largest(self) -> int:
        """Bytes of the KV cache when it was largest."""
        return max(self._largest, self.cache.nbytes)

    def decode(self, tokens: Array) -> None:
        """Compute `logits` after one more token per row, [B] int64."""
        self.logits = self._engine.decode(self.cache, tokens, self._length, self._length + self._ahead)
        self._length = self._length + 1
        self._steps = self._steps + 1
        self.faults = step_faults(self.logits, self._steps)

    def retain(self, rows: Array) -> bool:
        """Let only `rows` go on, [B'] int64, ascending; whether the engine can do that."""
        self._largest = self.largest
        if not self._engine.retain(self.cache, rows):
            return False
        self.logits = self.logits[rows]
        self._length, self._ahead = self._length[:, rows], self._ahead[:, rows]
        self._steps, self.faults = self._steps[rows], [self.faults[row] for row in rows]
        return True

    def join(self, other: Batch) -> bool:
        """Let the rows of `other` go on behind those of this batch; whether the engine can do that.

        `other` must not be used afterwards if it can.
        """
        self._largest = self.largest
        if not self._engine.join(self.cache, other.cache):
            return False
        self.logits = np.concatenate([self.logits, other.logits])
        self._length = np.concatenate([self._length, other._length], axis=1)
        self._ahead = np.concatenate([self._ahead, other._ahead], axis=1)
        self._steps = np.concatenate([self._steps, other._steps])
        self.faults = self.faults + other.faults
        return True


def _check_positions(lengths: Array, decoding: Decoding) -> None:
    """Refuse rows of `lengths` prompt tokens that leave no room for the new ones."""
    longest = int(lengths.max())
    if longest + decoding.max_new_tokens > decoding.max_positions:
        raise InputError(
            f"{longest} prompt tokens and {decoding.max_new_tokens} new ones exceed the model's {decoding.max_positions} "
            "positions; shorten the prompt or give a smaller --max-new-tokens"
        )


def _check_prompts(plan: PruningPlan, requests: Sequence[Request]) -> None:
    """Refuse prompts that the plan's method cannot rate."""
    if plan.methods.decoder is not None:
        behind = max(len(request.prompt.token_ids) - request.prompt.image_positions[0] for request in requests)
        plan.methods.decoder.check_prompt(behind + plan.vision_tokens)


def _result(row: int, vision: VisionOutput, prefill: PrefillOutput, bucket: int) -> Result:
    """The outputs of the graphs for one row, by stage."""
    result = Result(bucket=bucket)
    kept = vision.seen(bucket).kept
    if kept is not None:
        result.kept[VISION] = kept[row][kept[row] >= 0]
    if vision.score is not None:
        result.debug[f"score.{VISION}"] = vision.score[row]
    for name, array in prefill.stages.items():
        kind, _, layer = name.partition(".")
        if name == "ranking":
            result.ranking = array[row]
        elif kind == "kept":
            result.kept[f"decoder.{layer}"] = array[row][array[row] >= 0]
        else:
            result.debug[f"{kind}.decoder.{layer}" if layer else kind] = array[row]
    return result
