"""vtexport profile."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import click
import cloup

from vtexport.cli.arguments import BUNDLE, PATH


@cloup.command("profile")
@BUNDLE
@cloup.option("--against", metavar="DIR|dense", help="Another bundle, or dense: the same model, built without pruning.")
@cloup.option("--batch", default=1, show_default=True, help="Prompts per batch.")
@cloup.option("--new-tokens", default=16, show_default=True, help="Tokens decoded per run.")
@cloup.option("--runs", default=10, show_default=True, help="Recorded runs.")
@cloup.option(
    "--bucket", type=float, help="Which keep ratio of an auto bundle to measure.  [default: the sample photo's]"
)
@cloup.option("--layers", type=click.IntRange(1), help="Also list this many of each graph's slowest layers.")
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
    from vtexport.measure.files import check_folder
    from vtexport.measure.pages.page import check_page, save_page
    from vtexport.measure.pages.profile import profile_page
    from vtexport.measure.plots import check_plot, plot_profile

    if json_file is not None:
        check_folder(json_file, "--json")
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
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot_profile(report, plot_file)
    if html_file is not None:
        save_page(profile_page(report, layers), html_file, "--html")
    stdout.print(profile_table(report))
    if layers is not None:
        stdout.print(layer_table(report, layers))


COMMANDS = {"profile": profile}
