"""exit: every visual token leaves after one layer, the static form of DyVTE (arXiv 2411.19628)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtexport.errors import InputError
from vtexport.pruning.decoder import DecoderMethod, Scheduled
from vtexport.pruning.plan import Stage
from vtexport.pruning.schedule import Budget, parse_layers


@dataclass(frozen=True)
class Exit(DecoderMethod):
    """All visual tokens leave after layer e; their content has reached the text tokens by then.

    DyVTE learns e per image with small routers whose weights were never released. Here e is the same for all images:
    given as a layer, taken from the calibration (`--layers auto`), or the last layer that a keep ratio allows.
    """

    name = "exit"
    summary = "every visual token leaves after one decoder layer (static, training-free form of arXiv 2411.19628)"
    calibrated = True
    raters = "none"

    @property
    def fixes_keep(self) -> str:
        return "layers" if self.layers else ""

    def scheduled(self, budget: Budget) -> Scheduled:
        layer = self._layer(budget)
        return Scheduled(replace(self, layers=str(layer)), (Stage.decoder(layer, budget.entering, 0),))

    def _layer(self, budget: Budget) -> int:
        """The layer that the options, the calibration or the budget ask for."""
        if self.layers == "auto":
            if budget.calibration is None:
                raise InputError(
                    "--layers auto needs a calibrated exit layer, which this model's recipe lacks; run vtexport "
                    "calibrate and give its file as --calibration"
                )
            return min(budget.calibration.exit_layer, budget.num_layers - 2)
        if self.layers:
            layers = parse_layers(self.layers, budget.num_layers)
            if len(layers) != 1:
                raise InputError(f"--layers {self.layers}: method {self.name} has one exit; give one layer")
            return layers[0]
        layer = int(budget.target * budget.num_layers / budget.entering + 1e-9) - 1
        if layer < 0:
            least = 1 / budget.num_layers * budget.entering / budget.total
            raise InputError(
                f"--keep {budget.keep:g} is out of reach of {self.name}: the first layer alone costs {least:.3g}; "
                f"combine with a vision-stage method (--method fastervlm+{self.name})"
            )
        return min(layer, budget.num_layers - 2)
