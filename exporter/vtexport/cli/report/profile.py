"""The output of `vtexport profile`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import Facts, Paragraph, Table
from vtexport.figures import milliseconds, number, percent, size, times
from vtexport.measure.pages.profile import labels
from vtexport.measure.profile import STAGES, Report, Side, Stats


def profile_table(report: Report) -> RenderableType:
    """The table that `vtexport profile` prints."""
    sides = [side for side in (report.this, report.against) if side is not None]
    names = labels(sides)
    # Each header says whose figures they are, for terminals that are too narrow for the table.
    headers = [f"{name} {what}" for name in names for what in ("median", "p90", "p99")]
    comparing = ["speed-up", "by FLOPs"] if report.against is not None else []
    table = Table("stage, ms", *headers, *comparing)
    for stage in (s for s in STAGES if s in report.this.stages):
        cells = [cell for side in sides for cell in _cells(side.stages.get(stage))]
        if report.against is not None:
            measured, predicted = report.speedup.get(stage), report.flops_speedup.get(stage)
            cells += ["" if ratio is None else times(ratio) for ratio in (measured, predicted)]
        table.add_row(stage.replace("_", " "), *cells)
    for graph in report.this.on_device:
        table.add_row(f"{graph} on the GPU", *(cell for side in sides for cell in _cells(side.on_device.get(graph))))
    rows = [(name, _side(side)) for name, side in zip(names, sides, strict=True)]
    return Group(table, "", Facts(rows), Paragraph(_conditions(report)))


def layer_table(report: Report, number_of_layers: int) -> RenderableType:
    """The table that `vtexport profile --layers` adds."""
    table = Table("graph", "layer", "ms", "of the graph")
    for graph, layers in report.layers.items():
        total = sum(layers.values())
        for name, spent in list(layers.items())[:number_of_layers]:
            table.add_row(graph, name, milliseconds(spent), percent(spent / total) if total else "")
    return Group("", table, Paragraph("one answer, under the runtime's own profiler, which slows the run down"))


def _cells(stats: Stats | None) -> list[str]:
    return ["", "", ""] if stats is None else [milliseconds(value) for value in vars(stats).values()]


def _side(side: Side) -> str:
    first = side.gflops.get("first_token")
    cost = "" if first is None else f", {number(first)} GFLOPs to the first token"
    return (
        f"{side.bundle}: {side.method}, keep {number(side.keep)}, {number(side.mean_visual_tokens)} visual tokens, "
        f"peak memory {size(side.peak_memory_bytes)}, KV cache {size(side.cache_bytes)}{cost}"
    )


def _conditions(report: Report) -> str:
    known = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.device}; {known}; batch {number(report.batch)}, {number(report.text_tokens)} text tokens, "
        f"{number(report.new_tokens)} new tokens, {number(report.runs)} runs after {report.warm_up} to warm up; first "
        "token = preprocess + vision + prefill, pruning included"
    )
