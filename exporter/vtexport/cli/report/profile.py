"""The output of `vtexport profile`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import facts, make_table, megabytes
from vtexport.measure.profile import STAGES, Report, Side


def profile_table(report: Report) -> RenderableType:
    """The table that `vtexport profile` prints."""
    sides = [side for side in (report.this, report.against) if side is not None]
    table = make_table("stage, ms")
    for side in sides:
        for column in (f"{side.bundle} median", "p90", "p99"):
            table.add_column(column, justify="right", overflow="fold")
    if report.against is not None:
        table.add_column("speed-up", justify="right")
        table.add_column("by FLOPs", justify="right")
    for stage in (s for s in STAGES if s in report.this.stages):
        cells = [f"{v:.2f}" for side in sides for v in vars(side.stages[stage]).values()]
        if report.against is not None:
            predicted = report.flops_speedup.get(stage)
            cells += [f"{report.speedup[stage]:.2f}x", "" if predicted is None else f"{predicted:.2f}x"]
        table.add_row(stage.replace("_", " "), *cells)
    for graph in report.this.on_device:
        cells = [f"{v:.2f}" if v else "" for side in sides for v in _device_row(side, graph)]
        table.add_row(f"{graph} on the GPU", *cells)
    return Group(table, "", facts([_side_row(side) for side in sides]), _conditions(report))


def _device_row(side: Side, graph: str) -> list[float]:
    stats = side.on_device.get(graph)
    return [0.0, 0.0, 0.0] if stats is None else list(vars(stats).values())


def layer_table(report: Report, number: int) -> RenderableType:
    """The table that `vtexport profile --layers` adds."""
    table = make_table("graph", "layer", "ms", "of the graph")
    for graph, layers in report.layers.items():
        total = sum(layers.values())
        for name, spent in list(layers.items())[:number]:
            table.add_row(graph, name, f"{spent:.3f}", f"{spent / total:.1%}")
    return Group("", table, "one answer, under the runtime's own profiler, which slows the run down")


def _side_row(side: Side) -> tuple[str, str]:
    return (
        side.bundle,
        f"{side.method}, keep {side.keep:g}, {side.mean_visual_tokens:g} visual tokens, peak memory {megabytes(side.peak_memory_bytes)}, "
        f"KV cache {megabytes(side.cache_bytes)}, {side.gflops['first_token']:.4g} GFLOPs to the first token",
    )


def _conditions(report: Report) -> str:
    known = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"{report.device}; {known}; batch {report.batch}, {report.text_tokens} text tokens, {report.new_tokens} new "
        f"tokens, {report.runs} runs after {report.warm_up} to warm up; first token = preprocess + vision + prefill, "
        "pruning included"
    )
