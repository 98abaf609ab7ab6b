"""What the command line prints: tables and summaries, made from the library's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vtexport.builder.estimate import Estimate
from vtexport.bundle.folder import Bundle
from vtexport.measure.doctor import examine, kernels, versions
from vtexport.measure.evaluate import Score
from vtexport.measure.profile import STAGES, Report, Side
from vtexport.models.prompt import Prompter
from vtexport.models.resolve import read_recipe, recipe_names
from vtexport.models.spec import ModelSpec
from vtexport.pruning import DEFAULT_METHOD, METHODS, PruningPlan, dense_plan
from vtexport.pruning.adaptive import AdaptiveTable
from vtexport.pruning.flops import NOMINAL_TEXT_TOKENS, plan_flops
from vtexport.pruning.rank import Calibration
from vtexport.runtime.runner import Answer
from vtexport.targets import DEFAULT_TARGET, TARGETS


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _facts(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and values, a line each however long: a path or command in it can be copied whole."""
    width = max(len(name) for name, _ in rows)
    lines = [Text.assemble((name.ljust(width), "bold"), "  ", value) for name, value in rows]
    return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _verification(bundle: Bundle) -> str:
    found = bundle.manifest.verification
    if found is None:
        return "not checked"
    kept = "same kept tokens" if found.same_kept else "kept tokens equal up to rounding"
    answers = "same greedy tokens" if found.same_tokens else "greedy tokens equal up to rounding"
    return (
        f"{kept}, {answers}, largest logit error {found.max_logit_error:.1e} of {found.tolerance:g} allowed "
        f"({found.samples} samples x {found.tokens} tokens; {found.ran} against {found.against})"
    )


def _plan_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """The plan; of several, what chooses, and then each."""
    spec, policy = bundle.spec(), bundle.manifest.policy()
    plans = bundle.manifest.pruning_plans()
    rows: list[tuple[str, str]] = []
    if policy is not None:
        rows.append(("keep auto", f"{policy.accuracy:.1%} of answers as dense ones at calibration"))
        for number, plan in enumerate(plans):
            limit = f"spread up to {policy.limits[number - 1]:.4g} patches" if number else "any other image"
            rows.append((f"  keep {plan.keep:g}", limit))
    return rows + [row for plan in plans for row in _one_plan(plan, spec)]


def _one_plan(plan: PruningPlan, spec: ModelSpec) -> list[tuple[str, str]]:
    dense = dense_plan(plan)
    cost, full = plan_flops(spec, plan), plan_flops(spec, dense)
    flops = (
        f"{cost.first_token / 1e9:.4g} GFLOPs to the first token, {cost.first_token / full.first_token:.0%} of dense "
        f"(decoder alone {cost.prefill / full.prefill:.0%}; {NOMINAL_TEXT_TOKENS} text tokens)"
    )
    mean = f"{plan.mean_visual_tokens:.5g} of {plan.num_visual_tokens}, mean over decoder layers"
    if plan.decoder_stages:
        mean += f" ({plan.mean_visual_tokens_sparsevlm:.5g} by SparseVLM's count)"
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.options.items() if value != "")
    rows = [("method", f"{plan.method}, keep {plan.keep:g}" + (f" ({options})" if options else ""))]
    rows.append(("mean visual tokens", mean))
    rows += [(f"  {s.where}", f"{s.tokens_in} in, {s.kept} kept, {s.recycled} merged") for s in plan.stages]
    return [*rows, ("cost", flops)]


def dry_run_summary(found: Estimate) -> RenderableType:
    """What `vtexport build --dry-run` prints."""
    weights = f"{_megabytes(found.weight_bytes)} of weights " + ("converted" if found.converts else "as they are")
    check = (
        "this model" if found.checked_in_full else "a small model of the same layers, for this one does not fit here"
    )
    rows = [row for plan in found.recipe.plans for row in _one_plan(plan, found.spec)]
    return _facts(
        [
            *rows,
            ("target", f"{found.target}, {found.recipe.dtype}"),
            ("size", f"{weights}, about {_megabytes(found.graph_bytes)} of graphs"),
            ("peak memory", f"about {_megabytes(found.peak_memory)}"),
            ("checked on", check),
            ("written", "nothing: a dry run"),
        ]
    )


def build_summary(bundle: Bundle) -> RenderableType:
    """What `vtexport build` ends with: tokens, cost, sizes, verification, and the next command to type."""
    target = bundle.manifest.target
    rows = [
        *_plan_rows(bundle),
        ("target", f"{target.name}, {target.dtype}"),
        ("size", ", ".join(f"{name} {_megabytes(size)}" for name, size in _sizes(bundle).items())),
        ("verified", _verification(bundle)),
        ("next", _next(bundle)),
    ]
    return _facts([("bundle", str(bundle.folder)), *rows])


def _next(bundle: Bundle) -> str:
    """What to do with a bundle."""
    model = bundle.manifest.model
    if "decode" not in bundle.manifest.graphs:
        return "give it to TensorRT-LLM: README, Deploying LLaVA-1.5-7B"
    images = " ".join(["--image FILE"] * model.views.images)
    return f'vtexport run {bundle.folder} {images} --prompt "what is in the image?"'


def _sizes(bundle: Bundle) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in bundle.manifest.files:
        place = Path(entry.path).parts[0] if "/" in entry.path else "manifest"
        sizes[place] = sizes.get(place, 0) + entry.bytes
    return {**sizes, "total": bundle.size()}


def bundle_table(bundle: Bundle, *, verified: bool) -> RenderableType:
    """What `vtexport inspect` prints."""
    manifest = bundle.manifest
    files = _table("file", "bytes", "sha256")
    for entry in manifest.files:
        files.add_row(entry.path, f"{entry.bytes:,}", entry.sha256[:16])
    rows = [
        ("model", f"{manifest.model.name} ({manifest.model.family})"),
        *_plan_rows(bundle),
        ("target", f"{manifest.target.name}, {manifest.target.dtype}"),
        (
            "versions",
            ", ".join(f"{n} {v}" for n, v in {"vtexport": manifest.vtexport, **manifest.target.versions}.items()),
        ),
        ("verified", _verification(bundle)),
    ]
    if verified:
        rows.append(("files", "all as they were built"))
    return Group(_facts(rows), "", files)


class TokenStream:
    """Prints answers as tokens come: one row as it grows, a batch row by row at the end."""

    def __init__(self, prompter: Prompter, rows: int, write: Callable[..., Any]) -> None:
        self._prompter, self._write = prompter, write
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._printed = 0

    def add(self, row: int, token: int) -> None:
        """A token of `row` came."""
        self._tokens[row].append(token)
        if len(self._tokens) == 1:
            text = self._prompter.decode(self._tokens[0])
            # A character may need several tokens: what is not whole yet waits.
            if not text.endswith("\ufffd"):
                self._write(text[self._printed :], nl=False)
                self._printed = len(text)

    def close(self) -> None:
        """All tokens have come."""
        if len(self._tokens) == 1:
            self._write(self._prompter.decode(self._tokens[0])[self._printed :])
            return
        for number, tokens in enumerate(self._tokens, start=1):
            self._write(f"{number}. {self._prompter.decode(tokens)}")


def run_summary(answers: Sequence[Answer]) -> str:
    """A line on tokens and time; with `--keep auto` one for every keep ratio chosen."""
    return "\n".join(
        _run_line([answer for answer in answers if answer.keep == keep])
        for keep in sorted({answer.keep for answer in answers})
    )


def _run_line(answers: Sequence[Answer]) -> str:
    tokens, times = answers[0].visual_tokens, answers[0].timings_ms
    step = "" if times["per_token"] is None else f", {times['per_token']:.1f} ms a token"
    spreads = ", ".join(f"{answer.spread:.1f}" for answer in answers if answer.spread is not None)
    chosen = f"keep {answers[0].keep:g} chosen (attention spread over {spreads} patches): " if spreads else ""
    return (
        f"{chosen}{tokens['mean']:g} of {tokens['total']:g} visual tokens; preprocess {times['preprocess']:.1f} ms, "
        f"vision {times['vision']:.1f} ms, prefill {times['prefill']:.1f} ms{step}"
    )


def profile_table(report: Report) -> RenderableType:
    """What `vtexport profile` prints."""
    sides = [side for side in (report.this, report.against) if side is not None]
    table = _table("stage, ms")
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
    return Group(table, "", _facts([_side_row(side) for side in sides]), _conditions(report))


def _device_row(side: Side, graph: str) -> list[float]:
    found = side.on_device.get(graph)
    return [0.0, 0.0, 0.0] if found is None else list(vars(found).values())


def layer_table(report: Report, number: int) -> RenderableType:
    """What `vtexport profile --layers` prints besides."""
    table = _table("graph", "layer", "ms", "of the graph")
    for graph, layers in report.layers.items():
        total = sum(layers.values())
        for name, spent in list(layers.items())[:number]:
            table.add_row(graph, name, f"{spent:.3f}", f"{spent / total:.1%}")
    return Group("", table, "one answer, under the runtime's own profiler, which slows what it watches")


def _side_row(side: Side) -> tuple[str, str]:
    return (
        side.bundle,
        f"{side.method}, keep {side.keep:g}, {side.mean_visual_tokens:g} visual tokens, peak memory {_megabytes(side.peak_memory_bytes)}, "
        f"KV cache {_megabytes(side.cache_bytes)}, {side.gflops['first_token']:.4g} GFLOPs to the first token",
    )


def _conditions(report: Report) -> str:
    known = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"{report.device}; {known}; batch {report.batch}, {report.text_tokens} text tokens, {report.new_tokens} new "
        f"tokens, {report.runs} runs after {report.warm_up} to warm up; first token = preprocess + vision + prefill, "
        "pruning inside vision"
    )


def score_table(score: Score) -> RenderableType:
    """What `vtexport eval` prints."""
    table = _table("questions", "right", "of", "accuracy")
    for kind, (right, total) in score.by_kind.items():
        table.add_row(kind, str(right), str(total), f"{right / total:.1%}")
    table.add_row("all", str(score.right), str(score.total), f"{score.accuracy:.1%}")
    if len(score.by_keep) == 1:
        return table
    shares = ", ".join(f"keep {keep:g} for {count / score.total:.0%}" for keep, count in score.by_keep.items())
    return Group(table, "", f"{shares} of the questions, {score.mean_visual_tokens:.4g} visual tokens on average")


def calibration_table(found: Calibration) -> RenderableType:
    """What `vtexport calibrate` prints."""
    layers = _table("layer", "rank", "spread", "attention on the image")
    for layer, (rank, spread, mass) in enumerate(zip(found.ranks, found.rank_spread, found.mass, strict=True)):
        layers.add_row(str(layer), f"{rank:.1f}", f"{spread:.1f}", f"{mass:.1%}")
    choices = _table("keep", "--layers auto", "same next token")
    for keep, chosen, agreement in zip(found.keeps, found.layers, found.agreement, strict=True):
        choices.add_row(f"{keep:g}", ",".join(map(str, chosen)), f"{agreement:.1%}")
    notes = f"{found.pairs} pairs; visual tokens may leave after layer {found.exit_layer}"
    return Group(layers, "", choices, *(part for table in found.adaptive for part in ("", _spread(table))), "", notes)


def _spread(table: AdaptiveTable) -> Table:
    """Unchanged answers by keep ratio and spread of CLS's attention."""
    shown = _table(f"{table.method}, spread up to", *(f"{limit:.3g}" for limit in table.spread))
    for keep, row in zip(table.keeps, table.agreement, strict=True):
        shown.add_row(f"keep {keep:g}", *(f"{share:.0%}" for share in row))
    return shown


def catalogue() -> dict[str, dict[str, str]]:
    """Models, methods and targets, each name with its summary."""
    return {
        "models": {name: str(read_recipe(name)["summary"]) for name in recipe_names()},
        "methods": {name: method.summary for name, method in METHODS.items()},
        "targets": {name: target.summary for name, target in TARGETS.items()},
    }


def catalogue_tables() -> RenderableType:
    """What `vtexport list` prints."""
    defaults = (DEFAULT_METHOD, DEFAULT_TARGET)
    parts: list[RenderableType] = []
    for title, entries in catalogue().items():
        rows = [(name, text + (" (default)" if name in defaults else "")) for name, text in entries.items()]
        parts += [f"[bold]{title}[/bold]", _facts([(f"  {name}", text) for name, text in rows]), ""]
    parts.append("Any LLaVA-1.5 checkpoint in Hugging Face form works too: give its folder or hub id as --model.")
    return Group(*parts)


def health_tables() -> RenderableType:
    """What `vtexport doctor` prints."""
    rows = []
    for health in examine():
        for what, state in (("build", health.build), ("run", health.run)):
            rows.append((f"{health.name} {what}", f"{'works' if state.works else 'does not work'}: {state.reason}"))
    for what, state in kernels().items():
        rows.append((what, f"{'built' if state.works else 'not built'}: {state.reason}"))
    return Group(_facts(rows), "", _facts(list(versions().items())))
