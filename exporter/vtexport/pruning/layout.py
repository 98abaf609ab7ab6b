"""Where text and image stand in the rows of a batch: every row of its own length, padded on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of S = L + V places: text before the image, V visual tokens, text after it, padding.

    Attributes:
        image_position: [B] int64, text tokens before the image.
        text_length: [B] int64, text tokens of the prompt, at most L.
        text: L, text places of a row, padding included.
        visual: V, the same in every row.
    """

    image_position: Tensor
    text_length: Tensor
    text: int
    visual: int

    def places(self) -> Tensor:
        """0 … S - 1 for every row, [B, S] int64."""
        return self._count(self.text + self.visual).expand(self.text_length.shape[0], -1)

    def text_places(self) -> Tensor:
        """The place of every text token, [B, L] int64."""
        number = self._count(self.text)
        return number + self.visual * (number >= self.image_position[:, None]).to(number.dtype)

    def after_image(self) -> Tensor:
        """Which text tokens are the prompt's and stand after the image, [B, L] bool."""
        number = self._count(self.text)
        return (number >= self.image_position[:, None]) & (number < self.text_length[:, None])

    def last_place(self) -> Tensor:
        """The place of each prompt's last token, [B] int64."""
        return self.text_length + (self.visual - 1)

    def rows_of(self, x: Tensor, places: Tensor) -> Tensor:
        """The rows of x [B, S, C] at places [B, R]: [B, R, C]."""
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))

    def visual_of(self, x: Tensor) -> Tensor:
        """The visual rows [B, V, C] of x [B, S, C]."""
        return self.rows_of(x, self.image_position[:, None] + self._count(self.visual))

    def with_visual(self, x: Tensor, visual: Tensor) -> Tensor:
        """The rows x [B, S, C], their visual ones replaced by `visual` [B, K, C]: [B, L + K, C]."""
        import torch

        count = visual.shape[1]
        place = self._count(self.text + count)
        at = self.image_position[:, None]
        # Rows differ in where the image stands, so a gather from both puts them together.
        source = torch.where(place < at + count, place - at + x.shape[1], place - count + self.visual)
        source = torch.where(place < at, place, source)
        return self.rows_of(torch.cat([x, visual], dim=1), source)

    def _count(self, number: int) -> Tensor:
        import torch

        return torch.arange(number, device=self.text_length.device)[None]
