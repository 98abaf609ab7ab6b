"""Where text and images stand in the rows of a batch; every row has its own length and is padded on the right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of S = L + V places: text, with the visual tokens of each image at its place, then padding.

    Visual tokens are numbered across all images of a row. If a row has fewer than V, the rest of its places are
    padding too.

    Attributes:
        image_position: [B, n] int64, text tokens before each image, ascending.
        text_length: [B] int64, text tokens of the prompt, at most L.
        text: L, text places of a row, padding included.
        visual: V, visual places.
        counts: [B, n] int64, visual tokens of each image; None if every row has one image of V tokens.
    """

    image_position: Tensor
    text_length: Tensor
    text: int
    visual: int
    counts: Tensor | None = None

    @property
    def images(self) -> int:
        """How many images a row has, n."""
        return self.image_position.shape[1]

    def places(self) -> Tensor:
        """0 … S - 1 for every row, [B, S] int64."""
        return self._count(self.text + self.visual).expand(self.text_length.shape[0], -1)

    def text_places(self) -> Tensor:
        """The place of every text token, [B, L] int64."""
        return self._placed(self._count(self.text))

    def of_prompt(self) -> Tensor:
        """Which text places are the prompt's, not padding, [B, L] bool."""
        return self._count(self.text) < self.text_length[:, None]

    def after_image(self) -> Tensor:
        """Which text tokens are the prompt's and stand after the last image, [B, L] bool."""
        return (self._count(self.text) >= self.image_position[:, -1:]) & self.of_prompt()

    def last_place(self) -> Tensor:
        """The place of each prompt's last token, [B] int64."""
        return self.text_length + (self.visual - 1 if self.counts is None else self.counts.sum(dim=1) - 1)

    def bare(self) -> Layout:
        """The same rows without any visual token."""
        return replace(self, visual=0, counts=None if self.counts is None else self.counts * 0)

    def present(self) -> Tensor | None:
        """Which of the V visual tokens each row has, [B, V] bool; None if every row has all."""
        return None if self.counts is None else self.has(self._count(self.visual))

    def has(self, index: Tensor) -> Tensor:
        """Whether a row has the visual tokens numbered `index` [B, K], [B, K] bool; only for layouts with `counts`."""
        assert self.counts is not None, "rows are asked where they differ"
        return index < self.counts.sum(dim=1, keepdim=True)

    def counts_of(self, index: Tensor) -> Tensor | None:
        """How many of the visual tokens numbered `index` [B, K] each image has, [B, n] int64; None if `counts` is."""
        if self.counts is None:
            return None
        import torch

        within = [((index >= start) & (index < start + count)).sum(dim=1) for _, start, count in self._images()]
        return torch.stack(within, dim=1)

    def rows_of(self, x: Tensor, places: Tensor) -> Tensor:
        """The rows of x [B, S, C] at places [B, R]: [B, R, C]."""
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))

    def visual_of(self, x: Tensor) -> Tensor:
        """The visual rows [B, V, C] of x [B, S, C]; the last one is repeated where a batch row has fewer."""
        number = self._count(self.visual)
        if self.counts is not None:
            number = number.minimum(self.counts.sum(dim=1, keepdim=True) - 1)
        place = self.image_position[:, :1] + number
        before = self.image_position[:, :1]
        for at, start, _ in list(self._images())[1:]:
            place = place + (at - before) * (number >= start).to(number.dtype)
            before = at
        return self.rows_of(x, place)

    def with_visual(self, x: Tensor, visual: Tensor, after: Layout) -> Tensor:
        """The rows of x [B, S, C], visual ones replaced by `visual` [B, K, C]: [B, L + K, C], laid out as `after`."""
        import torch

        place = after._count(after.text + after.visual)
        # Images stand at different places in different rows, so the result is gathered from both tensors.
        number, token, shown = place, place, None
        for at, start, count in after._images():
            first = at + start
            inside = (place >= first) & (place < first + count)
            behind = (place >= first + count).to(place.dtype)
            number = number - count * behind
            token = torch.where(inside, place - at, token)
            shown = inside if shown is None else shown | inside
        assert shown is not None, "a row has an image"
        if after.counts is not None:
            # Places behind a row's last text token are padding, which may hold any row.
            number = number.clamp(max=self.text - 1)
        source = torch.where(shown, token + x.shape[1], self._placed(number))
        return self.rows_of(torch.cat([x, visual], dim=1), source)

    def images_first(self, x: Tensor) -> tuple[Tensor, Layout]:
        """The rows of x [B, S, C] with all images joined into one before all text, and their layout.

        Under causality, rows behind the last image see the same rows as before.
        """
        import torch

        total = None if self.counts is None else self.counts.sum(dim=1, keepdim=True)
        at = torch.zeros_like(self.image_position[:, :1])
        front = replace(self, image_position=at, counts=total)
        return front.bare().with_visual(self.rows_of(x, self.text_places()), self.visual_of(x), front), front

    def _placed(self, number: Tensor) -> Tensor:
        """The places [B, R] of the text tokens numbered `number` [1 or B, R]."""
        place = number
        for at, _, count in self._images():
            place = place + count * (number >= at).to(number.dtype)
        return place

    def _images(self) -> list[tuple[Tensor, Tensor | int, Tensor | int]]:
        """For every image: text tokens before it, visual tokens before it, visual tokens of it; [B, 1] each, or int."""
        if self.counts is None:
            return [(self.image_position[:, :1], 0, self.visual)]
        images: list[tuple[Tensor, Tensor | int, Tensor | int]] = []
        start = self.counts[:, :1] * 0
        for number in range(self.images):
            column = slice(number, number + 1)
            images.append((self.image_position[:, column], start, self.counts[:, column]))
            start = start + self.counts[:, column]
        return images

    def _count(self, number: int) -> Tensor:
        import torch

        return torch.arange(number, device=self.text_length.device)[None]
