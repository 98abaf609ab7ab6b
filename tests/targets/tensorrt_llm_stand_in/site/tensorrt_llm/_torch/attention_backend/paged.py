"""Attention over a paged cache. Lengths and places come from its arguments alone, as a kernel has them."""

from __future__ import annotations

import torch

from .rope import rotate

_SCHEMA = """(
    Tensor qkv, Tensor(a!) pool, Tensor block_offsets, Tensor kv_lens, Tensor prompt_lens, Tensor host_kv_lens,
    Tensor host_prompt_lens, Tensor host_request_types, Tensor host_total_kv_lens, bool host_lengths_are_old,
    Tensor? frequencies, int num_heads, int num_kv_heads, float scale, bool causal
) -> Tensor"""


@torch.library.custom_op("tensorrt_llm_stand_in::paged_attention", mutates_args={"pool"}, schema=_SCHEMA)
def paged_attention(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    block_offsets: torch.Tensor,
    kv_lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    host_kv_lens: torch.Tensor,
    host_prompt_lens: torch.Tensor,
    host_request_types: torch.Tensor,
    host_total_kv_lens: torch.Tensor,
    host_lengths_are_old: bool,
    frequencies: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Write new keys and values into the cache, then attend to all of the sequence's.

    Args:
        qkv: `[tokens, (num_heads + 2 * num_kv_heads) * head_dim]`; prompts first, then sequences with one new token.
        pool: the layer's pages, `[pages, num_kv_heads, tokens_per_block, head_dim]`.
        block_offsets: pages of keys and of values by sequence, `[sequences or more, 2, blocks]`.
        kv_lens: tokens of each sequence with the new ones, on the GPU.
        prompt_lens: new tokens of each prompt, on the GPU.
        host_kv_lens: `kv_lens` on the host.
        host_prompt_lens: `prompt_lens` on the host.
        host_request_types: 0 for prompts, 1 for the others, on the host.
        host_total_kv_lens: sums of `host_kv_lens` over prompts and over the others.
        host_lengths_are_old: the call is in a CUDA graph, which keeps host tensors as they were when it was recorded.
        frequencies: radians per position if queries and keys are to be rotated.
        num_heads: of queries.
        num_kv_heads: of keys, and of values.
        scale: of products.
        causal: whether a prompt's tokens see only those before them.

    Raises:
        ValueError: lengths contradict each other or `qkv`.
    """
    kinds = host_request_types.tolist()
    new = _new_tokens(kinds, host_prompt_lens.tolist(), qkv.shape[0])
    lengths = kv_lens.tolist()
    if not host_lengths_are_old:
        _agree(new, kinds, lengths, prompt_lens.tolist(), host_kv_lens.tolist(), host_total_kv_lens.tolist())
    heads = qkv.unflatten(-1, (-1, pool.shape[-1]))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    outputs, begin = [], 0
    for row, (count, length) in enumerate(zip(new, lengths, strict=True)):
        positions = torch.arange(length - count, length)
        part = slice(begin, begin + count)
        query, key = q[part], k[part]
        if frequencies is not None:
            query, key = rotate(query, positions, frequencies), rotate(key, positions, frequencies)
        keys = _through_pages(pool, block_offsets[row, 0], positions, length, key)
        values = _through_pages(pool, block_offsets[row, 1], positions, length, v[part])
        outputs.append(_attend(query, keys, values, positions, scale, causal))
        begin += count
    return torch.cat(outputs).flatten(1)


def _new_tokens(kinds: list[int], prompts: list[int], rows: int) -> list[int]:
    """How many tokens each sequence adds, which is a prompt's length or one."""
    if kinds != sorted(kinds):
        raise ValueError("prompts must come first")
    new = [prompts[row] if kind == 0 else 1 for row, kind in enumerate(kinds)]
    if sum(new) != rows:
        raise ValueError(f"the metadata's lengths are {new}, {sum(new)} in all, but there are {rows} tokens")
    return new


def _agree(
    new: list[int], kinds: list[int], lengths: list[int], device: list[int], host: list[int], totals: list[int]
) -> None:
    contexts = kinds.count(0)
    if device[:contexts] != new[:contexts]:
        raise ValueError(f"prompts have {new[:contexts]} tokens on the host, {device[:contexts]} on the GPU")
    if host != lengths:
        raise ValueError(f"sequences have {host} tokens on the host, {lengths} on the GPU")
    sums = [sum(lengths[:contexts]), sum(lengths[contexts:])]
    if totals != sums:
        raise ValueError(f"host_total_kv_lens is {totals}, but the sums are {sums}")
    if any(length < count for length, count in zip(lengths, new, strict=True)):
        raise ValueError(f"sequences have {lengths} tokens with {new} new ones")


def _through_pages(
    pool: torch.Tensor, pages: torch.Tensor, positions: torch.Tensor, length: int, rows: torch.Tensor
) -> torch.Tensor:
    """Write `rows` at `positions`, and read everything up to `length`: `[length, heads, dim]`."""
    block = pool.shape[2]
    if length > block * pages.shape[0]:
        raise ValueError(f"{length} tokens do not fit {pages.shape[0]} pages of {block}")
    pool[pages[positions // block].long(), :, positions % block] = rows.to(pool.dtype)
    read = torch.arange(length)
    return pool[pages[read // block].long(), :, read % block]


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys.float()) * scale
    if causal:
        hidden = torch.arange(keys.shape[0]) > positions[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float()).to(query.dtype)


@paged_attention.register_fake
def _(qkv: torch.Tensor, pool: torch.Tensor, *rest: object) -> torch.Tensor:
    num_heads = rest[9]
    return qkv.new_empty(qkv.shape[0], num_heads * pool.shape[-1])
