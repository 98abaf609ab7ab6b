"""The vision graph of a bundle as a PyTorch module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vtexport.graph.modules import Clip, Projector, VisionTower
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan
from vtexport.pruning.vision import RowOrder, TowerState, prune


class VisionGraph(nn.Module):
    """pixel_values [B, 3, S, S] fp32 -> visual [B, K, C], kept [B, K'] int32, with `debug` also score [B, V].

    With T views per prompt, pixel_values is [B, T, 3, S, S]. A method that reads the question adds the input
    question_ids [B, L] int64, tokens of CLIP's text tower. A sequence laid out by rows adds the input sequence [B, V]
    int64 and, if it is pruned, the input row_start [B, V] int64 and the output visual_length [B, n] int64
    (`vtexport.models.views.Rows`, `vtexport.pruning.vision.Pruned`).

    `kept` is absent if the graph prunes nothing (dense) or no token stays as it was (pool merges all). With several
    plans, each has its own visual.i and kept.i, unless none prunes here, and the output spread [B] fp32 is added, by
    which one of the plans is chosen.
    """

    def __init__(self, spec: ModelSpec, plans: Sequence[PruningPlan], debug: bool = False) -> None:
        super().__init__()
        self.spec, self.debug, self.chooses = spec, debug, len(plans) > 1
        self.plans = plans if plans[0].vision_stage is not None else plans[:1]
        self.by_rows, self.prunes = plans[0].newlines > 0, plans[0].vision_stage is not None
        self.method = plans[0].methods.vision
        self.vision = VisionTower(spec.vision)
        self.projector = Projector(
            spec.vision.hidden_size,
            spec.decoder.hidden_size,
            spec.projector_bias,
            spec.projector_activation,
        )
        if self.by_rows:
            self.image_newline = nn.Parameter(torch.empty(spec.decoder.hidden_size))
        if self.method.companion:
            assert spec.clip is not None, "a method that reads the question comes with a CLIP checkpoint"
            self.clip = Clip(spec.clip, spec.vision)
        self.pruning = nn.Module()
        for number, plan in enumerate(self.plans):
            part = nn.Module()
            for name, array in plan.methods.vision.constants(plan, spec.vision.grid).items():
                dtype = torch.from_numpy(array[:0]).dtype
                part.register_buffer(name, torch.empty(array.shape, dtype=dtype))
            self.pruning.add_module(str(number), part)

    def forward(self, pixel_values: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.input_names()[1:], others, strict=True))
        pixels = pixel_values if pixel_values.ndim == 4 else pixel_values.flatten(0, 1)
        pixels = pixels.to(self.vision.embeddings.patch_embedding.weight.dtype)
        features, layers = self.vision(pixels)
        v = self.spec.vision
        state = TowerState(features, layers, v.head_size**-0.5, v.grid, self.projector)
        if "question_ids" in given:
            relevance = self.clip(state.patches, given["question_ids"], self.spec.views.total)
            state = replace(state, relevance=relevance)
        rows = None
        if self.by_rows:
            images = self.spec.views.images
            rows = RowOrder(given["sequence"], given.get("row_start"), self.image_newline, images)
        outputs = []
        for plan, part in zip(self.plans, self.pruning.children(), strict=True):
            pruned = prune(plan, state, dict(part.named_buffers()), rows)
            # The runtime passes tokens on as NumPy arrays, and NumPy has no bf16.
            tokens = pruned.tokens.float() if pruned.tokens.dtype == torch.bfloat16 else pruned.tokens
            outputs += [tensor for tensor in (tokens, pruned.index, pruned.length) if tensor is not None]
        if self.debug and pruned.score is not None:
            outputs.append(pruned.score)
        if self.chooses:
            outputs.append(state.spread())
        return tuple(outputs)

    def input_names(self) -> list[str]:
        names = ["pixel_values"]
        names += [extra.name for extra in self.method.extras]
        if self.by_rows:
            names += ["sequence", "row_start"] if self.prunes else ["sequence"]
        return names

    def output_names(self) -> list[str]:
        names = []
        for number, plan in enumerate(self.plans):
            suffix = f".{number}" if len(self.plans) > 1 else ""
            stage = plan.vision_stage
            names += [f"visual{suffix}"]
            if stage is not None and stage.kept > plan.leading * plan.views:
                names.append(f"kept{suffix}")
            if stage is not None and self.by_rows:
                names.append("visual_length")
        if self.debug and self.method.scores:
            names.append("score")
        return [*names, "spread"] if self.chooses else names
