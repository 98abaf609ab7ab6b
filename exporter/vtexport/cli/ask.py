"""vtexport run and vtexport show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloup

from vtexport.cli.arguments import BUNDLE, COUNT, PATH, RANKING
from vtexport.cli.streams import say, say_json
from vtexport.errors import InputError


@cloup.command("run")
@BUNDLE
@cloup.option("--image", "images", multiple=True, type=PATH, help="An image file, or a video.")
@cloup.option("--prompt", "prompts", multiple=True, help="The question about it; <image> marks the image's place.")
@cloup.option("--messages", type=PATH, help="JSON file of a conversation's messages in place of --prompt; - for stdin.")
@cloup.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=COUNT,
    help="Maximum number of tokens per answer.",
)
@RANKING
@cloup.option("--json", "as_json", is_flag=True, help="Print one JSON object per question, one per line.")
def run(
    bundle: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    messages: Path | None,
    max_new_tokens: int,
    ranking_from: Path | None,
    as_json: bool,
) -> None:
    """Answer questions about images; several --image/--prompt pairs make a batch.

    \b
    vtexport run micro --image photo.png --prompt "what digit is red?"
    vtexport run micro --image photo.png --messages conversation.json
    """
    from vtexport.cli.console import stderr
    from vtexport.cli.report.answers import Printer, run_summary
    from vtexport.models.conversation import read_messages
    from vtexport.runtime.runner import Runner

    if messages is None and not prompts:
        raise InputError("--prompt is missing; ask something about the image")
    if messages is not None and prompts:
        raise InputError("--messages has no effect beside --prompt; give one of them")
    conversation = read_messages(messages) if messages is not None else None
    runner = Runner.open(bundle, ranking_from=ranking_from)
    if messages is not None:
        pairs: list[tuple[Any, Any]] = [(runner.prompter.open_pictures(images), conversation)]
    else:
        pairs = list(runner.prompter.pairs(images, prompts))
    if as_json:
        for answer in runner.ask(pairs, max_new_tokens):
            say_json(answer.to_json())
        return
    printer = Printer(runner.prompter, len(pairs), say)
    answers = runner.ask(pairs, max_new_tokens, printer.add)
    printer.close()
    stderr.print(run_summary(answers))


@cloup.command("show")
@BUNDLE
@cloup.option("--image", "images", required=True, multiple=True, type=PATH, help="An image file, or a video.")
@cloup.option("--prompt", help="A question to ask as well; it is shown with its answer.")
@RANKING
@cloup.option("-o", "--out", required=True, type=PATH, help="Picture or page to write, such as kept.png or kept.html.")
def show(bundle: Path, images: tuple[Path, ...], prompt: str | None, ranking_from: Path | None, out: Path) -> None:
    """Draw which parts of an image a bundle keeps; a name that ends in .html makes a page to explore.

    \b
    vtexport show micro --image photo.png --prompt "what digit is red?" -o kept.png
    vtexport show micro --image photo.png --prompt "what digit is red?" -o kept.html
    """
    from vtexport.measure.drawing import draw
    from vtexport.measure.pages.page import is_page
    from vtexport.measure.pages.show import show_page
    from vtexport.measure.show import look_at, picture_format, saved
    from vtexport.runtime.runner import Runner
    from vtexport.writing import check_file, write_whole

    picture = None if is_page(out) else picture_format(out)
    check_file(out, "-o", images)
    runner = Runner.open(bundle, ranking_from=ranking_from)
    shown = look_at(runner, runner.prompter.open_pictures(images), prompt)
    if picture is None:
        write_whole(out, show_page(runner, shown), "-o")
    else:
        write_whole(out, saved(draw(shown, runner.bundle.manifest.model.name), picture), "-o")
    say(out)
    if shown.answer:
        say(shown.answer, err=True)


COMMANDS = {"run": run, "show": show}
