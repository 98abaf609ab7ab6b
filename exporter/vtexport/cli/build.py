"""vtexport build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from vtexport.builder.options import BuildOptions
from vtexport.cli import options
from vtexport.errors import InputError
from vtexport.models.spec import ViewChoice
from vtexport.options import parse_options
from vtexport.pruning import METHODS, DecoderMethod, VisionMethod
from vtexport.pruning.method import Combination
from vtexport.targets import TARGETS

_VISION: dict[str, type] = {name: method for name, method in METHODS.items() if issubclass(method, VisionMethod)}
_DECODER: dict[str, type] = {name: method for name, method in METHODS.items() if issubclass(method, DecoderMethod)}
#: classes whose options `vtexport build` takes besides its own
_METHOD_OWNERS = (*METHODS.values(), Combination)
#: flags that say how to write a bundle, which a dry run does not do
_WRITING = ("out", "force")

MODEL = cloup.option("--model", required=True, help="A name from `vtexport list`, a checkpoint's folder, or a hub id.")


@cloup.command("build")
@cloup.option_group(
    "What to build",
    MODEL,
    *options.of_class(BuildOptions, "keep", "method", "target", "dtype"),
    cloup.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: MODEL-METHOD-KEEP]"),
    cloup.option("--force", is_flag=True, help="Replace an existing bundle at --out."),
    cloup.option("--dry-run", is_flag=True, help="Say what would be built and what it takes; needs config.json only."),
)
@cloup.option_group(
    "Pruning inside the decoder",
    *options.of_classes(_DECODER),
    *options.of_class(BuildOptions, "calibration"),
)
@cloup.option_group(
    "Pruning in the vision stage", *options.of_classes(_VISION), *options.of_class(Combination, "vision_keep")
)
@cloup.option_group(
    "A keep ratio per image (--keep auto)", *options.of_class(BuildOptions, "buckets", "target_accuracy")
)
@cloup.option_group("Images per prompt, and tiles", *options.of_class(ViewChoice))
@cloup.option_group("Targets", *options.of_classes(dict(TARGETS)))
@cloup.option_group("Extra outputs of the engines", *options.of_class(BuildOptions, "give_ranking", "debug"))
def build(model: str, out: Path | None, force: bool, dry_run: bool, **values: Any) -> None:
    """Build a bundle: a folder of engine files to deploy.

    \b
    vtexport build --model micro-llava --keep 0.25 --out micro
    vtexport build --model micro-llava --keep 0.1 --method fastervlm+sparsevlm
    vtexport build --model micro-llava --keep auto --target-accuracy 0.95
    vtexport build --model llava-hf/llava-1.5-7b-hf --schedule sparsevlm-192 --target tensorrt-rtx --sm 89,120
    """
    from vtexport.builder.build import build as build_bundle
    from vtexport.builder.build import dry_run as estimate
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report.bundle import build_summary, dry_run_summary

    build_options = parse_options(
        BuildOptions,
        options.given(values, [BuildOptions]),
        "vtexport build",
        model=model,
        method_options=options.given(values, _METHOD_OWNERS),
        target_options=options.given(values, TARGETS.values()),
        views=parse_options(ViewChoice, options.given(values, [ViewChoice]), "vtexport build"),
    )
    if dry_run:
        for name, is_given in zip(_WRITING, (out is not None, force), strict=True):
            if is_given:
                raise InputError(f"--{name} has no effect with --dry-run, which writes nothing; leave it out")
        stdout.print(dry_run_summary(estimate(build_options)))
        return
    with stage_progress() as progress:
        bundle = build_bundle(build_options, out or _default_folder(build_options), force=force, progress=progress)
    stdout.print(build_summary(bundle))


def _default_folder(build_options: BuildOptions) -> Path:
    """MODEL-METHOD-KEEP; an option that fixes the counts stands in place of the keep ratio."""
    given, keep = build_options.method_options, build_options.keep
    label = given.get("schedule") or (f"{keep:g}" if isinstance(keep, float) else keep or given.get("layers") or "1")
    return Path(f"{Path(build_options.model).name}-{build_options.method}-{label}")


COMMANDS = {"build": build}
