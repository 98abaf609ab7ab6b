"""vtexport deploy."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from vtexport.cli.arguments import BUNDLE, PATH
from vtexport.cli.streams import say
from vtexport.deploy.roads import ROADS


@cloup.command("deploy")
@BUNDLE
@cloup.option("--to", "road", required=True, type=click.Choice(list(ROADS)), help="What is to load it.")
@cloup.argument("out", metavar="OUT", type=PATH, help="The folder to write.")
def deploy(bundle: Path, road: str, out: Path) -> None:
    """Write a bundle as another server or runtime loads it.

    \b
    vtexport deploy micro --to triton model-repository
    """
    from vtexport.bundle.folder import Bundle
    from vtexport.deploy.roads import deploy as write

    command = write(Bundle.open(bundle), ROADS[road], out)
    say(out)
    say(f"start it with: {command}", err=True)


COMMANDS = {"deploy": deploy}
