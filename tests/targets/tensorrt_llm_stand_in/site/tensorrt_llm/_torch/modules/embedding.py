"""The table of embeddings and the last layer, which may share it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...mapping import Mapping
from .linear import Linear, TensorParallelMode


class LMHead(Linear):
    """From hidden states to logits."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
        use_custom_cublas_mm: bool = False,
    ) -> None:
        super().__init__(
            embedding_dim,
            num_embeddings,
            bias=False,
            dtype=dtype,
            mapping=mapping,
            tensor_parallel_mode=tensor_parallel_mode,
            gather_output=gather_output,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    @property
    def vocab_size_padded(self) -> int:
        """Logits of a row."""
        return self.out_features

    def forward(
        self,
        input: torch.Tensor,
        *,
        all_reduce_params: Any = None,
        mapping_lm_head_tp: Mapping | None = None,
        is_spec_decoding_head: bool = False,
    ) -> torch.Tensor:
        """Logits of `input`, `[tokens, embedding_dim]`."""
        return super().forward(input)


class Embedding(LMHead):
    """From token ids to hidden states."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        mapping: Mapping | None = None,
        tensor_parallel_mode: TensorParallelMode | None = None,
        gather_output: bool = False,
        enable_torch_compile_for_embedding: bool | None = False,
        use_custom_cublas_mm: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, mapping, tensor_parallel_mode, gather_output)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embeddings of ids; one that the table lacks is an error, as it is on a GPU."""
        return F.embedding(input, self.weight)
