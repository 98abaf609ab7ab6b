"""The lengths of a batch's rows in every part of the decoder, as numbers on the host; nothing here needs TensorRT-LLM.

A stage cuts the decoder in two: the layers after it run on fewer rows than those before. A *part* is the run of layers
between two stages. The plan fixes how many visual tokens a part sees, so that every length is known before anything
runs, without waiting for the GPU. Part 0 drops nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtexport.pruning import PruningPlan


@dataclass(frozen=True)
class Images:
    """Where a request's images stand in its prompt.

    Attributes:
        places: text tokens before each image, ascending.
        counts: visual tokens of each image that enter the decoder.
        text: text tokens of the prompt.
    """

    places: tuple[int, ...]
    counts: tuple[int, ...]
    text: int

    @property
    def visual(self) -> int:
        """Visual tokens of all images."""
        return sum(self.counts)

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.text + self.visual


@dataclass(frozen=True)
class Lengths:
    """The rows of a batch in one part: contexts first, then generations, as TensorRT-LLM orders them.

    Attributes:
        new: tokens of each row in this step; one per generation.
        prompts: tokens of each row's prompt, as many as its context brought into this part.
        cached: tokens of each row that this part's layers hold already.
    """

    new: list[int]
    prompts: list[int]
    cached: list[int]


class Schedule:
    """The parts of a decoder, and how many tokens each request has dropped before each of them.

    A request that is not known has dropped nothing: prompts without images, and the requests with which TensorRT-LLM
    warms up.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan
        self.stages = sorted(plan.decoder_stages)
        self._dropped: dict[int, list[int]] = {}

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.stages) + 1

    def part_of(self, layer: int) -> int:
        """The number of the part that `layer` is in."""
        return sum(layer > stage for stage in self.stages)

    def visual(self, images: Images) -> list[int]:
        """Visual tokens in each part of a prompt with `images`."""
        entering = self.plan.entering([images.visual])
        # No plan has a stage after the last layer.
        return [entering[layer][0] for layer in (0, *(stage + 1 for stage in self.stages))]

    def start(self, request: int, images: Images) -> None:
        """Note what `request` drops, whose prompt runs now; whatever was noted under its number before is forgotten."""
        visual = self.visual(images)
        self._dropped[request] = [visual[0] - tokens for tokens in visual]

    def forget(self, request: int) -> None:
        """Forget `request`, whose caches are free again."""
        self._dropped.pop(request, None)

    def dropped(self, request: int) -> list[int]:
        """Tokens that `request` has dropped before each part."""
        return self._dropped.get(request, [0] * self.parts)

    def __len__(self) -> int:
        """How many requests are noted."""
        return len(self._dropped)

    def lengths(
        self,
        part: int,
        requests: Sequence[int],
        contexts: int,
        new: Sequence[int],
        prompts: Sequence[int],
        cached: Sequence[int],
    ) -> Lengths:
        """The lengths of a batch in `part`, from those that TensorRT-LLM gives for part 0.

        Args:
            part: the number of the part.
            requests: the numbers of the requests, one per row.
            contexts: how many rows, from the first on, run their prompt in this step.
            new: tokens of each row in this step.
            prompts: tokens of each row's prompt.
            cached: tokens of each row that the caches hold.
        """
        dropped = [self.dropped(request)[part] for request in requests]
        return Lengths(
            [
                count - less if row < contexts else count
                for row, (count, less) in enumerate(zip(new, dropped, strict=True))
            ],
            [count - less for count, less in zip(prompts, dropped, strict=True)],
            # A context that drops tokens holds nothing yet: neither blocks of others nor chunks of itself are reused.
            [
                count if row < contexts else count - less
                for row, (count, less) in enumerate(zip(cached, dropped, strict=True))
            ],
        )
