"""vtexport profile."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import cloup

from vtexport.cli.arguments import BUNDLE, COUNT, PATH, Finite

if TYPE_CHECKING:
    from vtexport.measure.profile import Report
    from vtexport.writing import Output


@cloup.command("profile")
@BUNDLE
@cloup.option("--against", metavar="DIR|dense", help="Another bundle, or dense: the same model, built without pruning.")
@cloup.option("--batch", default=1, show_default=True, type=COUNT, help="Prompts per batch.")
@cloup.option("--new-tokens", default=16, show_default=True, type=COUNT, help="Tokens decoded per run.")
@cloup.option("--runs", default=10, show_default=True, type=COUNT, help="Recorded runs.")
@cloup.option(
    "--bucket",
    type=Finite(0, 1, min_open=True),
    help="Which keep ratio of an auto bundle to measure.  [default: the sample photo's]",
)
@cloup.option("--layers", type=COUNT, help="Also list this many of each graph's slowest layers.")
@cloup.option("--json", "json_file", type=PATH, help="Also write the report to this file.")
@cloup.option("--plot", "plot_file", type=PATH, help="Also draw the report into this file.")
@cloup.option("--html", "html_file", type=PATH, help="Also write the report as a page, such as report.html.")
def profile(
    bundle: Path,
    against: str | None,
    batch: int,
    new_tokens: int,
    runs: int,
    bucket: float | None,
    layers: int | None,
    json_file: Path | None,
    plot_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure latency by stage, alone or alternating with another bundle.

    \b
    vtexport profile micro --against dense --html report.html
    """
    from vtexport.builder.build import build_dense_twin
    from vtexport.bundle.folder import Bundle
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report.profile import layer_table, profile_table
    from vtexport.measure import profile as profiling
    from vtexport.measure.pages.page import check_page
    from vtexport.measure.plots import check_plot
    from vtexport.writing import check_apart, check_file, write_all

    check_apart([("--json", json_file), ("--plot", plot_file), ("--html", html_file)])
    if json_file is not None:
        check_file(json_file, "--json")
    if plot_file is not None:
        check_plot(plot_file)
    if html_file is not None:
        check_page(html_file, "--html")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(stage_progress())
        other = None if against is None else Path(against)
        if against == "dense":
            other = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dense"
            build_dense_twin(Bundle.open(bundle), other, progress)
        progress.stage("measure", profiling.WARM_UP + runs)
        settings = profiling.Settings(batch, new_tokens, runs, bucket)
        report = profiling.profile(bundle, other, settings, against_label=against, advance=progress.advance)
        if layers is not None:
            progress.stage("measure layers")
            report.layers = profiling.layer_times(bundle, settings)
    write_all(_outputs(report, layers, json_file, plot_file, html_file))
    stdout.print(profile_table(report))
    if layers is not None:
        stdout.print(layer_table(report, layers))


def _outputs(
    report: Report, layers: int | None, json_file: Path | None, plot_file: Path | None, html_file: Path | None
) -> list[Output]:
    """The files that were asked for."""
    from vtexport.figures import to_json
    from vtexport.measure.pages.profile import profile_page
    from vtexport.measure.plots import profile_plot
    from vtexport.writing import Output

    outputs = []
    if json_file is not None:
        outputs.append(Output(json_file, to_json(report.to_json(), indent=2) + "\n", "--json"))
    if plot_file is not None:
        outputs.append(Output(plot_file, profile_plot(report, plot_file), "--plot"))
    if html_file is not None:
        outputs.append(Output(html_file, profile_page(report, layers), "--html"))
    return outputs


COMMANDS = {"profile": profile}
