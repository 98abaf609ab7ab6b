"""Rows of several requests, as TensorRT-LLM has them one behind the other, and as a batch that pruning works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtexport.errors import VerificationError
from vtexport.pruning.decoder import DecoderState
from vtexport.pruning.layout import Layout
from vtexport.targets.tensorrt_llm.torch_model.stages import Images


@dataclass(frozen=True)
class Row:
    """A context of a step: its place among the step's rows, the number of its request, and its images."""

    number: int
    request: int
    images: Images


@dataclass(frozen=True)
class Packed:
    """The contexts with images of one step, which can be taken out of the packed rows of all its requests.

    Attributes:
        rows: these contexts.
        lengths: tokens of every row of the step, in order.
        layout: where text and images stand in the batch of these contexts, of S places each.
        positions: [B, S] int64, RoPE positions.
        index: [B, S] int64, the packed row that each place of the batch shows; padding shows the context's last.
    """

    rows: Sequence[Row]
    lengths: Sequence[int]
    layout: Layout
    positions: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[Row], lengths: Sequence[int], padded: int, counted: bool, device: torch.device
    ) -> Packed:
        """The contexts before any stage.

        Args:
            rows: the contexts.
            lengths: tokens of every row of the step.
            padded: visual places per context, at least as many as any has.
            counted: whether contexts differ in their visual tokens, or have several images (`Layout.counts`).
            device: where the packed rows are.
        """
        layout = Layout(
            on_device([row.images.places for row in rows], device),
            on_device([row.images.text for row in rows], device),
            max(row.images.text for row in rows),
            padded,
            on_device([row.images.counts for row in rows], device) if counted else None,
        )
        return cls(rows, lengths, layout, layout.places(), _index(rows, lengths, layout, device))

    def batch(self, packed: Tensor) -> Tensor:
        """The contexts' rows of packed [T, C], [B, S, C]."""
        return packed[self.index]

    def state(self, packed: Tensor) -> DecoderState:
        """The contexts' rows of packed [T, C] between two layers."""
        return DecoderState(self.batch(packed), self.positions, self.layout)

    def after(self, state: DecoderState, lengths: Sequence[int]) -> tuple[Packed, Tensor]:
        """The contexts as a stage left them, and where the packed rows after it come from.

        Args:
            state: the batch after the stage.
            lengths: tokens of every row of the step after the stage.

        Raises:
            VerificationError: a context would go on with more tokens than the stage left it.

        Returns:
            the contexts; and an index [T'] into the packed rows before the stage followed by those of `state`, flat.
        """
        width, total, start = state.hidden.shape[1], sum(self.lengths), 0
        batch_row = {row.number: number for number, row in enumerate(self.rows)}
        sources: list[int] = []
        for number, (before, now) in enumerate(zip(self.lengths, lengths, strict=True)):
            if number in batch_row and now > width:
                raise VerificationError(
                    f"a stage left at most {width} tokens of a prompt, attention behind it expects {now}; please report this"
                )
            first = total + batch_row[number] * width if number in batch_row else start
            sources += range(first, first + now)
            start += before
        device = state.hidden.device
        index = _index(self.rows, lengths, state.layout, device)
        return Packed(self.rows, lengths, state.layout, state.positions, index), on_device(sources, device)


def on_device(numbers: object, device: torch.device) -> Tensor:
    """Numbers as int64; a copy to a GPU does not wait for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _index(rows: Sequence[Row], lengths: Sequence[int], layout: Layout, device: torch.device) -> Tensor:
    width, places = layout.text + layout.visual, []
    for row in rows:
        start, last = sum(lengths[: row.number]), lengths[row.number] - 1
        places.append([start + min(place, last) for place in range(width)])
    return on_device(places, device)
