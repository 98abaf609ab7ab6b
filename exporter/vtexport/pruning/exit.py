"""exit: every visual token leaves after one layer, the static shadow of DyVTE (arXiv 2411.19628)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vtexport.errors import InputError
from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.plan import Option, Stage
from vtexport.pruning.schedule import Budget, parse_layers


class Exit(DecoderMethod):
    """All visual tokens leave after layer e; what they had to say is in the text by then.

    DyVTE learns e per image with small routers whose weights were never released. Here e is one for all: given as a
    layer, taken from the calibration (`--layers auto`), or the last layer that a keep ratio pays for.
    """

    name = "exit"
    summary = "every visual token leaves after one decoder layer (static, training-free form of arXiv 2411.19628)"
    calibrated = True
    raters = "none"
    options: ClassVar[Mapping[str, Option]] = {"layers": "", "positions": "compact"}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": ("compact", "original")}

    def decides_keep(self, options: Mapping[str, Option]) -> str:
        return "layers" if options["layers"] else ""

    def stages(self, budget: Budget, options: dict[str, Option]) -> tuple[Stage, ...]:
        asked = str(options["layers"])
        if asked == "auto":
            if budget.exit_layer is None:
                raise InputError(
                    "--layers auto needs a calibrated exit layer, which this model's recipe lacks; run vtexport "
                    "calibrate and give its file as --ranks"
                )
            layers: tuple[int, ...] = (min(budget.exit_layer, budget.num_layers - 2),)
        elif asked:
            layers = parse_layers(asked, budget.num_layers)
            if len(layers) != 1:
                raise InputError(f"--layers {asked}: method {self.name} has one exit; give one layer")
        else:
            layer = int(budget.target * budget.num_layers / budget.entering + 1e-9) - 1
            if layer < 0:
                least = 1 / budget.num_layers * budget.entering / budget.total
                raise InputError(
                    f"--keep {budget.keep:g} is out of reach of {self.name}: the first layer alone costs {least:.3g}; "
                    f"combine with a vision-stage method (--method fastervlm+{self.name})"
                )
            layers = (min(layer, budget.num_layers - 2),)
        options["layers"] = str(layers[0])
        return (Stage.decoder(layers[0], budget.entering, 0),)
