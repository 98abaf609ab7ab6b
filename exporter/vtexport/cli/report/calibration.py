"""The output of `vtexport calibrate`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from vtexport.cli.report.layout import make_table
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.calibration import Calibration


def calibration_table(calibration: Calibration) -> RenderableType:
    """The tables of `calibration` that `vtexport calibrate` prints."""
    layers = make_table("layer", "rank", "spread", "attention on the image")
    for layer, (rank, spread, mass) in enumerate(
        zip(calibration.ranks, calibration.rank_spread, calibration.mass, strict=True)
    ):
        layers.add_row(str(layer), f"{rank:.1f}", f"{spread:.1f}", f"{mass:.1%}")
    choices = make_table("keep", "--layers auto", "same next token")
    for keep, chosen, agreement in zip(calibration.keeps, calibration.layers, calibration.agreement, strict=True):
        choices.add_row(f"{keep:g}", ",".join(map(str, chosen)), f"{agreement:.1%}")
    notes = f"{calibration.pairs} pairs; visual tokens may leave after layer {calibration.exit_layer}"
    return Group(
        layers, "", choices, *(part for table in calibration.adaptive for part in ("", _spread(table))), "", notes
    )


def _spread(table: AdaptiveTable) -> Table:
    """The share of unchanged answers by keep ratio and spread of CLS's attention."""
    shown = make_table(f"{table.method}, spread up to", *(f"{limit:.3g}" for limit in table.spread))
    for keep, row in zip(table.keeps, table.agreement, strict=True):
        shown.add_row(f"keep {keep:g}", *(f"{share:.0%}" for share in row))
    return shown
