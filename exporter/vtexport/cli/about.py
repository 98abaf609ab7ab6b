"""vtexport inspect, vtexport list and vtexport doctor."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import click
import cloup

from vtexport.cli.arguments import BUNDLE, JSON
from vtexport.cli.streams import say_json


@cloup.command("inspect")
@BUNDLE
@cloup.option("--verify", is_flag=True, help="Also hash every file against the manifest.")
@JSON
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Describe a bundle, and with --verify check that its files are unchanged.

    \b
    vtexport inspect micro --verify
    """
    from vtexport.bundle.folder import Bundle
    from vtexport.bundle.manifest import encode
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report.bundle import bundle_table

    opened = Bundle.open(bundle)
    if verify:
        with stage_progress() as progress:
            progress.stage("hash files", opened.size())
            opened.verify(progress.advance)
    if as_json:
        # JSON escapes the control characters of ASCII, and terminals know others.
        text = encode(opened.manifest).decode()
        click.echo(re.sub(r"[\x7f-\x9f]", lambda one: f"\\u{ord(one[0]):04x}", text), nl=False)
    else:
        stdout.print(bundle_table(opened, verified=verify))


@cloup.command("list")
@JSON
def list_(as_json: bool) -> None:
    """List models, methods and targets."""
    from vtexport.cli.console import stdout
    from vtexport.cli.report.catalogue import catalogue, catalogue_tables

    if as_json:
        say_json(catalogue())
    else:
        stdout.print(catalogue_tables())


@cloup.command("doctor")
@JSON
def doctor(as_json: bool) -> None:
    """Say which targets work on this machine, and what is missing for the others."""
    from vtexport.cli.console import stdout
    from vtexport.cli.report.catalogue import health_tables
    from vtexport.measure.doctor import examine, kernels, versions

    if as_json:
        health = {"versions": versions(), "targets": [asdict(target) for target in examine()]}
        native = {name.replace(" ", "_").lower(): asdict(state) for name, state in kernels().items()}
        say_json({**health, **native})
    else:
        stdout.print(health_tables())


COMMANDS = {"inspect": inspect, "list": list_, "doctor": doctor}
