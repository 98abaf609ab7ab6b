"""vtc-cls: CLS attention summed over the tower's later layers (arXiv 2412.05819)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vtexport.errors import InputError
from vtexport.pruning.plan import Option, PruningPlan
from vtexport.pruning.vision import Pruned, TowerState, VisionMethod

if TYPE_CHECKING:
    from torch import Tensor


class VTCCls(VisionMethod):
    """Top K patches by the head-mean CLS row, summed over tower layers l0 … the feature layer.

    The authors record no default for l0 (`tower_from`); here it is the middle of the tower.
    """

    name = "vtc-cls"
    summary = "as fastervlm, CLS attention summed over the later half of the tower (arXiv 2412.05819)"
    reads_cls = True
    skips_padding = True
    scores = True
    options: ClassVar[Mapping[str, Option]] = {"tower_from": -1}

    def resolve(self, options: dict[str, Option], tower_layers: int) -> None:
        first = int(options["tower_from"])
        if first == -1:
            options["tower_from"] = tower_layers // 2
        elif not 0 <= first < tower_layers:
            raise InputError(
                f"--tower-from {first} is out of range: the tower has {tower_layers} layers up to the feature layer; "
                f"give 0 to {tower_layers - 1}"
            )

    def select(self, state: TowerState, plan: PruningPlan, constants: Mapping[str, Tensor]) -> Pruned:
        from vtexport.pruning.ops import token_select

        first = int(plan.options["tower_from"])
        score = state.cls_score(first)
        for layer in range(first + 1, len(state.layers)):
            score = score + state.cls_score(layer)
        tokens, index = token_select(state.patches, score, plan.patch_budget)
        return Pruned(tokens, index, score)
