"""The paged KV cache."""

from __future__ import annotations

from typing import Any

import torch


class KVCacheManager:
    """Blocks of `tokens_per_block` tokens for every layer, and which of them each request has.

    Blocks are filled with NaN when a request gets them and when it gives them back.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_batch_size: int,
        dtype: torch.dtype,
        blocks: int | None = None,
    ) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.tokens_per_block, self.max_seq_len, self.max_batch_size = tokens_per_block, max_seq_len, max_batch_size
        self.dtype, self.num_pools = dtype, 1
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.num_blocks = blocks or self.max_blocks_per_seq * max_batch_size + 1
        self.layer_offsets = {layer: layer for layer in range(num_layers)}
        # Keys of block n are page 2n, its values page 2n + 1.
        self.pools = [
            torch.full((2 * self.num_blocks, num_kv_heads, tokens_per_block, head_dim), float("nan"), dtype=dtype)
            for _ in range(num_layers)
        ]
        self.kv_cache_pool_pointers = torch.tensor([[pool.data_ptr() for pool in self.pools]])
        self.kv_cache_pool_mapping = torch.zeros(num_layers, 2, dtype=torch.int32)
        # Not in order, so that no one counts on neighbours; what was given back last goes out first.
        self.free = [(7 * block) % self.num_blocks for block in range(self.num_blocks)]
        if len(set(self.free)) != self.num_blocks:
            self.free = list(reversed(range(self.num_blocks)))
        self.held: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}

    def get_buffers(self, layer_idx: int) -> torch.Tensor:
        """A layer's pages, `[2 * blocks, heads, tokens_per_block, head_dim]`."""
        return self.pools[layer_idx]

    def add_sequence(self, request_id: int, tokens: int) -> None:
        """Give a new request blocks for `tokens` tokens.

        Raises:
            ValueError: it has some already.
        """
        if request_id in self.held:
            raise ValueError(f"request {request_id} has blocks already")
        self.held[request_id], self.tokens[request_id] = [], 0
        self._grow(request_id, tokens)

    def add_token(self, request_id: int) -> None:
        """Make room for one token more."""
        self._grow(request_id, self.tokens[request_id] + 1)

    def _grow(self, request_id: int, tokens: int) -> None:
        self.tokens[request_id] = tokens
        while len(self.held[request_id]) * self.tokens_per_block < tokens:
            if not self.free:
                raise RuntimeError("no free blocks")
            block = self.free.pop()
            self._spoil(block)
            self.held[request_id].append(block)

    def free_resources(self, request: Any, pin_on_release: bool = False) -> None:
        """Take back what `request` holds. Models may wrap this to learn when a request ends."""
        self.tokens.pop(request.py_request_id, None)
        for block in self.held.pop(request.py_request_id, []):
            self._spoil(block)
            self.free.append(block)

    def _spoil(self, block: int) -> None:
        for pool in self.pools:
            pool[2 * block : 2 * block + 2] = float("nan")

    def get_batch_cache_indices(self, request_ids: list[int]) -> list[list[int]]:
        """The blocks of requests."""
        return [self.held[request_id] for request_id in request_ids]

    def copy_batch_block_offsets(
        self, dst_tensor: torch.Tensor, request_ids: list[int], beam_width: int, num_context: int, num_seqs: int
    ) -> None:
        """Write the pages of requests into rows of `dst_tensor`, `[pools, num_seqs or more, 2, blocks]`.

        Raises:
            KeyError: a request holds no blocks.
        """
        for row, request_id in enumerate(request_ids[:num_seqs]):
            blocks = torch.tensor(self.held[request_id], dtype=torch.int32)
            dst_tensor[0, row, 0, : len(blocks)] = 2 * blocks
            dst_tensor[0, row, 1, : len(blocks)] = 2 * blocks + 1

    @property
    def impl(self) -> KVCacheManager:
        """What is C++ in TensorRT-LLM: this too."""
        return self
