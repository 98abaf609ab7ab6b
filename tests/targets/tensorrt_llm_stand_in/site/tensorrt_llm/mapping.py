"""Which part of a model a process has: all of it, or one of several as far as questions about it go."""

from __future__ import annotations

import torch


class Mapping:
    """Sizes and ranks of the ways to split a model."""

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        *,
        cp_size: int = 1,
        cp_config: dict | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        pp_partition: list[int] | None = None,
        moe_cluster_size: int = -1,
        moe_tp_size: int = -1,
        moe_ep_size: int = -1,
        attn_tp_size: int = -1,
        attn_cp_size: int = -1,
        enable_attention_dp: bool = False,
        enable_lm_head_tp_in_adp: bool = False,
    ) -> None:
        if tp_size * pp_size * cp_size != world_size:
            raise ValueError(
                f"world_size {world_size} is not tp_size {tp_size} * pp_size {pp_size} * cp_size {cp_size}"
            )
        self.world_size, self.rank, self.gpus_per_node = world_size, rank, gpus_per_node
        self.tp_size, self.pp_size, self.cp_size, self.cp_config = tp_size, pp_size, cp_size, cp_config or {}
        self.pp_partition = pp_partition
        self.enable_attention_dp, self.enable_lm_head_tp_in_adp = enable_attention_dp, enable_lm_head_tp_in_adp

    @property
    def tp_rank(self) -> int:
        """This process's share of every layer."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """This process's group of layers."""
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def dp_size(self) -> int:
        """How many copies of attention there are."""
        return self.tp_size if self.enable_attention_dp else 1

    def has_pp(self) -> bool:
        """Whether layers are on several GPUs."""
        return self.pp_size > 1

    def has_tp(self) -> bool:
        """Whether each layer is on several GPUs."""
        return self.tp_size > 1

    def has_cp_helix(self) -> bool:
        """Whether a sequence is on several GPUs: never."""
        return False

    def is_first_pp_rank(self) -> bool:
        """Whether this process has the first layers."""
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        """Whether this process has the last layers."""
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        """The layers of this process, one after another."""
        return torch.tensor_split(torch.arange(num_layers), self.pp_size)[self.pp_rank].tolist()
