"""A calibration by the definitions: one pair, one plan and one forward pass at a time, on the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from vtexport.check.reference import ReferenceModel
from vtexport.models.prompt import Prompt
from vtexport.models.views import Views
from vtexport.pruning import Geometry, PruningPlan, make_plan
from vtexport.pruning.decoder import DecoderState
from vtexport.pruning.raters import text_raters


@dataclass
class Pair:
    """A pair on the model; `attention` is by layer [R, V]."""

    model: ReferenceModel
    prompt: Prompt
    views: Views

    def __post_init__(self) -> None:
        self.plan = partial(make_plan, geometry=Geometry.of(self.model.spec))
        self.dense = self.plan("dense", keep=1.0)
        self.token = int(self.logits(self.dense)[0].argmax())

    def logits(self, plan: PruningPlan, new_tokens: Sequence[int] = ()) -> Any:
        seen = self.model.vision(self.views, plan)
        return self.model.answer(self.prompt, seen.visual, new_tokens, plan, length=seen.length).logits

    def chance(self, plan: PruningPlan) -> tuple[float, bool]:
        logits = self.logits(plan)[0].astype(np.float64)
        weights = np.exp(logits - logits.max())
        return float(weights[self.token] / weights.sum()), int(logits.argmax()) == self.token

    def changed(self, layer: int) -> bool:
        return not self.chance(self.plan("exit", keep=None, options={"layers": str(layer)}))[1]

    def answer(self, most: int) -> list[int]:
        tokens = [self.token]
        while len(tokens) < most and tokens[-1] not in self.model.spec.eos_token_ids:
            tokens.append(int(self.logits(self.dense, tokens)[-1].argmax()))
        return tokens

    def unchanged(self, plan: PruningPlan, answer: list[int]) -> bool:
        return self.logits(plan, answer[:-1]).argmax(axis=1).tolist() == answer

    def attention(self) -> list[Any]:
        """Softmax of query · key over the rows up to each rater, head by head."""
        model, d = self.model, self.model.spec.decoder
        seen = model.vision(self.views, self.dense)
        found = []
        with torch.inference_mode():
            embedded = model.embed([self.prompt], seen.visual, [()], [seen.length])
            rows, layout = embedded.rows, embedded.rows.layout
            raters = text_raters(embedded.image, embedded.text, layout.after_image(), layout.present())[0]
            places = layout.text_places()[0][raters]
            columns = layout.visual_of(layout.places()[..., None])[0, : sum(seen.length), 0]
            for number in range(d.num_layers):
                hidden, rotated = model.layer(number, rows)
                total = torch.zeros(len(places), len(columns))
                for head in range(d.num_heads):
                    group = head // (d.num_heads // d.num_kv_heads)
                    query = rotated.query[0][:, head * d.head_size : (head + 1) * d.head_size]
                    key = rotated.key[0][:, group * d.head_size : (group + 1) * d.head_size]
                    for row, place in enumerate(places):
                        logits = key[: place + 1] @ query[place] * d.head_size**-0.5
                        total[row] += torch.softmax(logits, dim=0)[columns]
                found.append((total / d.num_heads).numpy())
                rows = DecoderState(hidden, rows.positions, rows.layout)
        return found
