"""Text raters: the prompt tokens whose attention decides which visual tokens stay (SparseVLM, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def text_raters(visual: Tensor, text: Tensor, after_image: Tensor, present: Tensor | None = None) -> Tensor:
    """The text tokens after the image that are most similar to it.

    m = softmax over text of visual · textᵀ, mean over visual tokens; a rater's m is strictly greater than the mean
    of m. If no m is (a single token, or all alike), every token after the image rates; SparseVLM's released code
    divides by zero in that case.

    Args:
        visual: [B, V, C], the decoder's input embeddings of visual tokens.
        text: [B, L, C], those of text tokens.
        after_image: [B, L] bool, text tokens that may rate; padding and text before the image may not.
        present: [B, V] bool, which visual tokens each row has; None if every row has all.

    Returns:
        [B, L] bool.
    """
    import torch

    logits = visual.float() @ text.float().transpose(1, 2)
    logits = logits.masked_fill(~after_image[:, None], -torch.inf)
    # A row without any text after the image would be NaN; it gets no raters, and scores of zero.
    # A sum over V does for the mean: weights are compared with their own mean only.
    shares = torch.softmax(logits, dim=-1).nan_to_num(0.0)
    if present is not None:
        shares = shares * present[..., None].to(shares.dtype)
    weight = shares.sum(dim=1) / visual.shape[1]
    count = after_image.sum(dim=1, keepdim=True).clamp(min=1)
    above = after_image & (weight > weight.sum(dim=1, keepdim=True) / count)
    none = above.float().sum(dim=1, keepdim=True) == 0
    return above | (after_image & none)
