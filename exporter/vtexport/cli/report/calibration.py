"""The output of `vtexport calibrate`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import Paragraph, Table
from vtexport.figures import fixed, number, percent
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.calibration import Calibration


def calibration_table(calibration: Calibration) -> RenderableType:
    """The tables of `calibration` that `vtexport calibrate` prints."""
    layers = Table("layer", "rank", "spread", "attention on the image")
    for layer, (rank, spread, mass) in enumerate(
        zip(calibration.ranks, calibration.rank_spread, calibration.mass, strict=True)
    ):
        layers.add_row(str(layer), fixed(rank), fixed(spread), percent(mass))
    choices = Table("keep", "--layers auto", "same next token")
    for keep, chosen, agreement in zip(calibration.keeps, calibration.layers, calibration.agreement, strict=True):
        choices.add_row(number(keep), ",".join(map(str, chosen)), percent(agreement))
    notes = f"{number(calibration.pairs)} pairs; visual tokens may leave after layer {calibration.exit_layer}"
    return Group(
        layers,
        "",
        choices,
        *(part for table in calibration.adaptive for part in ("", _spread(table))),
        "",
        Paragraph(notes),
    )


def _spread(table: AdaptiveTable) -> Table:
    """The share of unchanged answers by keep ratio and spread of CLS's attention."""
    shown = Table(f"{table.method}, spread up to", *(number(limit) for limit in table.spread))
    for keep, row in zip(table.keeps, table.agreement, strict=True):
        shown.add_row(f"keep {number(keep)}", *(percent(share, 0) for share in row))
    return shown
