"""The graph that only chooses visual tokens, for a language model that runs elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vtexport.graph.graphs import PrefillGraph
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import rated
from vtexport.pruning.ops import token_select
from vtexport.pruning.selection import rating_layer, selecting_stage


class SelectGraph(PrefillGraph):
    """The decoder up to the attention that rates visual tokens, and the embeddings of the tokens that it rates highest.

    The plan is one that `vtexport.pruning.selection.selection_plan` made. The layers before the one whose attention
    rates run whole, and of that one only the norm, the queries of the rating rows, and the keys. The module has no other
    parameters.

    Inputs: those of `PrefillGraph`.

    Outputs: chosen [B, K, C], the rows of the input `visual` that the plan's stage keeps, unchanged and in their order;
    kept [B, K] int32, their indices. If there is an input visual_length, there is also the output chosen_length [B, n]
    int64, how many of the K belong to each image; a row that has fewer has them in front, and -1 behind them in `kept`.
    """

    def __init__(self, spec: ModelSpec, plan: PruningPlan) -> None:
        self.number, self.stage = rating_layer(plan), selecting_stage(plan)
        # Tied embeddings stand for a head that is not there.
        decoder = replace(spec.decoder, num_layers=self.number + 1, tied_embeddings=True)
        super().__init__(replace(spec, decoder=decoder), plan)
        last = self.decoder.block(self.number)
        del self.decoder.norm, last.post_attention_layernorm, last.mlp, last.self_attn.v_proj, last.self_attn.o_proj

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.input_names(), inputs, strict=True))
        assert self.method is not None, "a plan that chooses has a decoder-stage method"
        rows, raters = self.entering(given)
        for number in range(self.number):
            _, _, mixed, *_ = self.attended(number, rows)
            rows = self.after(number, rows, mixed)
        score = rated(self.method, self.attention_of(self.number, rows, raters), rows.layout, raters)
        # Not the embeddings that the decoder computed with: these may have been rounded.
        chosen, index, _ = token_select(given["visual"], score, self.stage.kept)
        length = rows.layout.counts_of(index)
        if length is None:
            return chosen, index
        return chosen, torch.where(rows.layout.has(index), index, torch.full_like(index, -1)), length

    def output_names(self) -> list[str]:
        return ["chosen", "kept", *(["chosen_length"] if self.spec.views.counted else [])]
