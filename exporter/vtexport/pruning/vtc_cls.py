"""vtc-cls: CLS attention summed over the tower's later layers (arXiv 2412.05819)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from vtexport.errors import InputError
from vtexport.options import Meta
from vtexport.pruning.plan import PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VTCCls(VisionMethod):
    """Top K patches by the head-mean CLS row, summed over tower layers l0 up to the feature layer.

    The authors give no default for l0 (`tower_from`); here it is the middle of the tower.
    """

    name = "vtc-cls"
    summary = "as fastervlm, CLS attention summed over the later half of the tower (arXiv 2412.05819)"
    reads_cls = True
    skips_padding = True
    scores = True
    tower_from: Annotated[
        int | None,
        Meta(
            ge=0,
            description="First vision tower layer whose CLS attention counts.",
            extra={"default": "the middle one"},
        ),
    ] = None

    def settled(self, tower_layers: int) -> VTCCls:
        first = tower_layers // 2 if self.tower_from is None else self.tower_from
        if first >= tower_layers:
            raise InputError(
                f"--tower-from {first} is out of range: the tower has {tower_layers} layers up to the feature layer; "
                f"give 0 to {tower_layers - 1}"
            )
        return replace(self, tower_from=first)

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        from vtexport.pruning.ops import token_select

        first = self.tower_from
        assert first is not None, "a plan settles its methods"
        score = state.cls_score(first)
        for layer in range(first + 1, len(state.layers)):
            score = score + state.cls_score(layer)
        tokens, index, _ = token_select(state.patches, score, plan.patch_budget)
        return Pruned(tokens, index, score)
