"""The command line: each command parses, calls the library and prints; nothing heavy is imported before it is needed."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from vtexport.cli import options
from vtexport.errors import InputError, StorageError, VtexportError

_BUNDLE = click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
_MODEL = click.option("--model", required=True, help="A model of `vtexport list`, a checkpoint folder, or a hub id.")
_RANKING = click.option("--ranking-from", type=click.Path(path_type=Path), help="Bundle that ranks for method sgl.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vtexport")
def cli() -> None:
    """Compile LLaVA into inference engines that prune visual tokens inside.

    \b
    vtexport build --model micro-llava --keep 0.25 --out micro
    vtexport run micro --image photo.png --prompt "what digit is red?"
    """


@cli.command()
@_MODEL
@click.option(
    "--keep",
    type=options.KeepRatio(),
    help="Mean visual tokens over the decoder's layers, as a share above 0, at most 1; auto chooses for every image.",
)
@click.option("--buckets", help="The keep ratios that --keep auto chooses from.  [default: 0.5,0.25,0.125]")
@click.option("--target-accuracy", type=float, help="Answers that --keep auto must leave as they are.  [default: 0.97]")
@click.option("--method", help="Pruning method of `vtexport list`, or two as VISION+DECODER.  [default: sparsevlm]")
@click.option("--target", help="Runtime to build for.  [default: onnxruntime]")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="[default: the recipe's, or the checkpoint's own, bf16 as fp16]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: MODEL-METHOD-KEEP]")
@click.option("--force", is_flag=True, help="Replace a bundle that stands at --out.")
@click.option("--dry-run", is_flag=True, help="Say what would be built and what it takes; needs config.json only.")
@click.option("--give-ranking", is_flag=True, help="Let a dense bundle rank visual tokens for another (method sgl).")
@click.option("--debug", is_flag=True, help="Let the engines also give out scores, raters and clusters.")
@options.of_methods
@options.of_views
@options.of_targets
def build(
    model: str,
    keep: float | str | None,
    buckets: str | None,
    target_accuracy: float | None,
    method: str | None,
    target: str | None,
    dtype: str | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
    give_ranking: bool,
    debug: bool,
    ranks: Path | None,
    **extra: Any,
) -> None:
    """Build a bundle: a folder of engine files to deploy.

    \b
    vtexport build --model micro-llava --keep 0.25 --out micro
    vtexport build --model micro-llava --keep 0.1 --method fastervlm+sparsevlm
    vtexport build --model micro-llava --keep auto --target-accuracy 0.95
    vtexport build --model llava-hf/llava-1.5-7b-hf --schedule sparsevlm-192 --target tensorrt-rtx --sm 89,120
    """
    from vtexport.builder import build as building
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report import build_summary, dry_run_summary
    from vtexport.models.spec import Asked
    from vtexport.pruning import DEFAULT_METHOD
    from vtexport.pruning.adaptive import parse_buckets
    from vtexport.targets import DEFAULT_TARGET, get_target

    method = method or DEFAULT_METHOD
    chosen = get_target(target or DEFAULT_TARGET)
    made = building.BuildOptions(
        model=model,
        keep=1.0 if keep is None and method == "dense" else keep,
        method=method,
        target=chosen.name,
        dtype=dtype,
        method_options=options.given(extra, options.METHODS),
        target_options=options.given(extra, options.TARGETS),
        buckets=None if buckets is None else parse_buckets(buckets),
        target_accuracy=target_accuracy,
        ranks=ranks,
        views=Asked(**options.given(extra, options.VIEWS)),
        give_ranking=give_ranking,
        debug=debug,
    )
    if dry_run:
        for flag, given in (("out", out is not None), ("force", force)):
            if given:
                raise InputError(f"--{flag} has no effect with --dry-run, which writes nothing; leave it out")
        stdout.print(dry_run_summary(building.dry_run(made)))
        return
    label = extra["schedule"] or (f"{keep:g}" if isinstance(keep, float) else keep or extra["layers"] or "1")
    destination = out or Path(f"{Path(model).name}-{method}-{label}")
    with stage_progress() as progress:
        bundle = building.build(made, destination, force=force, progress=progress)
    stdout.print(build_summary(bundle))


@cli.command()
@_MODEL
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSON lines of image (a path) and prompt.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write, such as ranks.toml.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Also draw the measurements into this file.")
@click.option("--exit-tolerance", default=0.0, show_default=True, help="Share of pairs whose next token may change.")
@click.option("--method", "methods", multiple=True, help="Also try this method for --keep auto; may be repeated.")
@click.option("--buckets", help="Keep ratios to try it at.  [default: 0.5,0.33,0.25,0.17,0.125]")
@options.of_views
def calibrate(
    model: str,
    data: Path,
    out: Path,
    plot_file: Path | None,
    exit_tolerance: float,
    methods: tuple[str, ...],
    buckets: str | None,
    **extra: Any,
) -> None:
    """Measure a model: the ranks that sparsevlm's schedules rest on, and what --keep auto must know of a method.

    \b
    vtexport calibrate --model micro-llava --data pairs.jsonl -o ranks.toml --plot ranks.png --method sparsevlm
    vtexport build --model micro-llava --keep 0.25 --ranks ranks.toml
    vtexport build --model micro-llava --keep auto --ranks ranks.toml
    """
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report import calibration_table
    from vtexport.measure import calibrate as calibration
    from vtexport.measure.show import check_destination
    from vtexport.models.spec import Asked
    from vtexport.pruning.adaptive import parse_buckets

    if buckets is not None and not methods:
        raise InputError("--buckets has no effect without --method; leave it out")
    asked = calibration.Asked(
        methods, calibration.BUCKETS if buckets is None else parse_buckets(buckets), exit_tolerance
    )
    if not out.absolute().parent.is_dir():
        raise StorageError(f"{out}: {out.absolute().parent} is not a folder; give another -o")
    if plot_file is not None:
        check_destination(plot_file)
    pairs = calibration.read_pairs(data)
    with stage_progress() as progress:
        progress.stage("measure pairs, try layers and methods", calibration.steps(pairs, asked))
        views = Asked(**options.given(extra, options.VIEWS))
        found = calibration.calibrate_model(model, pairs, asked, progress.advance, views)
    found.save(out)
    if plot_file is not None:
        calibration.plot(found, plot_file)
    stdout.print(calibration_table(found))


@cli.command()
@_BUNDLE
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image file, or a video.")
@click.option("--prompt", "prompts", multiple=True, help="The question about it; <image> says where the image stands.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@_RANKING
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a question, one a line.")
def run(
    bundle: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    max_new_tokens: int,
    ranking_from: Path | None,
    as_json: bool,
) -> None:
    """Answer questions about images; several --image/--prompt pairs make a batch.

    \b
    vtexport run micro --image photo.png --prompt "what digit is red?"
    """
    from vtexport.cli.console import stderr
    from vtexport.cli.report import TokenStream, run_summary
    from vtexport.runtime.runner import Runner

    if not prompts:
        raise InputError("--prompt is missing; ask something about the image")
    runner = Runner.open(bundle, ranking_from=ranking_from)
    opened = runner.prompter.pairs(images, prompts)
    if as_json:
        for answer in runner.ask(opened, max_new_tokens):
            click.echo(json.dumps(answer.to_json()))
        return
    stream = TokenStream(runner.prompter, len(opened), click.echo)
    answers = runner.ask(opened, max_new_tokens, stream.add)
    stream.close()
    stderr.print(run_summary(answers), style="dim", soft_wrap=True)


@cli.command()
@_BUNDLE
@click.option("--image", "images", required=True, multiple=True, type=click.Path(path_type=Path), help="An image file.")
@click.option("--prompt", help="A question, asked too and shown with its answer.")
@_RANKING
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Picture to write, such as kept.png.")
def show(bundle: Path, images: tuple[Path, ...], prompt: str | None, ranking_from: Path | None, out: Path) -> None:
    """Draw which parts of an image a bundle keeps.

    \b
    vtexport show micro --image photo.png -o kept.png
    """
    from vtexport.measure import show as drawing
    from vtexport.runtime.runner import Runner

    drawing.check_destination(out)
    runner = Runner.open(bundle, ranking_from=ranking_from)
    drawing.save(drawing.draw(runner, runner.prompter.open_pictures(images), prompt), out)
    click.echo(out)


@cli.command()
@_BUNDLE
@click.option("--against", help="Another bundle, or `dense`: the same model unpruned, built for the occasion.")
@click.option("--batch", default=1, show_default=True)
@click.option("--new-tokens", default=16, show_default=True, help="Tokens decoded a run.")
@click.option("--runs", default=10, show_default=True)
@click.option("--bucket", type=float, help="Keep ratio of an auto bundle to measure.  [default: the sample photo's]")
@click.option("--layers", type=click.IntRange(1), help="Also list so many of each graph's slowest layers.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the report to this file.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Also draw the report into this file.")
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
) -> None:
    """Measure latency by stage, alone or in turns with another bundle.

    \b
    vtexport profile micro --against dense --plot latency.png
    """
    from vtexport.builder.build import build_dense_twin
    from vtexport.bundle.folder import Bundle
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report import layer_table, profile_table
    from vtexport.measure import profile as profiling
    from vtexport.measure.show import check_destination

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise StorageError(f"{json_file}: {json_file.absolute().parent} is not a folder; give another --json")
    if plot_file is not None:
        check_destination(plot_file)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(stage_progress())
        other = None if against is None else Path(against)
        if against == "dense":
            other = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dense"
            build_dense_twin(Bundle.open(bundle), other, progress)
        progress.stage("measure", profiling.WARM_UP + runs)
        report = profiling.profile(
            bundle,
            other,
            batch=batch,
            new_tokens=new_tokens,
            runs=runs,
            against_label=against,
            bucket=bucket,
            advance=progress.advance,
        )
        if layers is not None:
            progress.stage("measure layers")
            report.layers = profiling.layer_times(bundle, batch=batch, new_tokens=new_tokens, bucket=bucket)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        profiling.plot(report, plot_file)
    stdout.print(profile_table(report))
    if layers is not None:
        stdout.print(layer_table(report, layers))


@cli.command("eval")
@_BUNDLE
@click.option("--limit", type=int, help="Ask only the first so many questions.")
@_RANKING
@_JSON
def evaluate(bundle: Path, limit: int | None, ranking_from: Path | None, as_json: bool) -> None:
    """Exact match on micro-llava's held-out questions.

    \b
    vtexport eval micro --limit 200
    """
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report import score_table
    from vtexport.measure.evaluate import evaluate as evaluate_bundle
    from vtexport.micro.heldout import NUM_QUESTIONS
    from vtexport.runtime.runner import Runner

    number = NUM_QUESTIONS if limit is None else limit
    runner = Runner.open(bundle, ranking_from=ranking_from)
    with stage_progress() as progress:
        progress.stage("ask held-out questions", number)
        score = evaluate_bundle(runner, number, progress.advance)
    if as_json:
        kinds = {kind: right / total for kind, (right, total) in score.by_kind.items()}
        found = {"accuracy": score.accuracy, "questions": score.total, "by_kind": kinds, "by_keep": score.by_keep}
        click.echo(json.dumps({**found, "mean_visual_tokens": score.mean_visual_tokens}))
    else:
        stdout.print(score_table(score))


@cli.command()
@_BUNDLE
@click.option("--verify", is_flag=True, help="Also hash every file against the manifest.")
@_JSON
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Say what a bundle is, and with --verify that it is unchanged.

    \b
    vtexport inspect micro --verify
    """
    from vtexport.bundle.folder import Bundle
    from vtexport.bundle.manifest import encode
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report import bundle_table

    opened = Bundle.open(bundle)
    if verify:
        with stage_progress() as progress:
            progress.stage("hash files", opened.size())
            opened.verify(progress.advance)
    if as_json:
        click.echo(encode(opened.manifest), nl=False)
    else:
        stdout.print(bundle_table(opened, verified=verify))


@cli.command("list")
@_JSON
def list_(as_json: bool) -> None:
    """List models, methods and targets."""
    from vtexport.cli.console import stdout
    from vtexport.cli.report import catalogue, catalogue_tables

    if as_json:
        click.echo(json.dumps(catalogue()))
    else:
        stdout.print(catalogue_tables())


@cli.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Say which targets work on this machine, and what is missing for the others."""
    from dataclasses import asdict

    from vtexport.cli.console import stdout
    from vtexport.cli.report import health_tables
    from vtexport.measure.doctor import examine, kernels, versions

    if as_json:
        found = {"versions": versions(), "targets": [asdict(health) for health in examine()]}
        native = {name.replace(" ", "_").lower(): asdict(state) for name, state in kernels().items()}
        click.echo(json.dumps({**found, **native}))
    else:
        stdout.print(health_tables())


def main() -> None:
    """Run the command line; errors meant for the user become one line and exit code 2."""
    try:
        cli.main(standalone_mode=False)
    except VtexportError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; nothing was written", err=True)
        sys.exit(130)
