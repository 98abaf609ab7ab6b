"""vtexport eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from vtexport.cli.arguments import BUNDLE, COUNT, JSON, PATH, RANKING
from vtexport.cli.streams import say_json
from vtexport.errors import InputError
from vtexport.measure.scoring import METRICS, Metric

if TYPE_CHECKING:
    from vtexport.measure.questions import Item
    from vtexport.progress import Progress

#: prompts per batch and tokens per answer at most, on a user's own questions
_BATCH, _NEW_TOKENS = 1, 16


@cloup.command("eval")
@BUNDLE
@cloup.option_group(
    "Questions",
    cloup.option(
        "--data",
        type=PATH,
        help="JSON lines of image (a path, or several), prompt, and answers or answer.  [default: micro-llava's held-out "
        "questions]",
    ),
    cloup.option("--metric", type=click.Choice(list(METRICS)), help="How answers are scored.  [default: exact]"),
    cloup.option("--limit", type=int, help="Ask only this many of the questions, the first ones."),
    cloup.option("--batch", type=COUNT, help="Prompts per batch.  [default: 1; 16 for the held-out questions]"),
    cloup.option(
        "--max-new-tokens",
        type=COUNT,
        help="Maximum number of tokens per answer.  [default: 16; 6 for the held-out questions]",
    ),
)
@cloup.option_group(
    "Bundles",
    cloup.option(
        "--against",
        multiple=True,
        metavar="DIR|dense|random",
        help="Another bundle that answers the same questions, or dense or random: the same model without pruning, or with a "
        "random choice of as many visual tokens; may be repeated.",
    ),
    RANKING,
)
@cloup.option_group(
    "Results",
    cloup.option("--output", type=PATH, help="Also write every answer into this file, as JSON lines."),
    JSON,
)
def evaluate(
    bundle: Path,
    data: Path | None,
    metric: str | None,
    limit: int | None,
    batch: int | None,
    max_new_tokens: int | None,
    against: tuple[str, ...],
    ranking_from: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score a bundle's answers to questions, beside those of other bundles.

    \b
    vtexport eval micro --limit 200
    vtexport eval micro --data questions.jsonl --metric vqa --against other --against random
    """
    from vtexport.cli.console import stage_progress, stdout
    from vtexport.cli.report.evaluation import evaluation_table
    from vtexport.measure import evaluate as evaluation
    from vtexport.measure.sides import Settings, evaluate_sides
    from vtexport.writing import check_file, write_whole

    if data is None and metric is not None:
        raise InputError(
            "--metric has no effect without --data, as the held-out questions have one answer; leave it out"
        )
    if output is not None:
        check_file(output, "--output", [] if data is None else [data])
    own, chosen = data is not None, METRICS[metric or "exact"]
    settings = Settings(
        chosen,
        batch or (_BATCH if own else evaluation.BATCH),
        max_new_tokens or (_NEW_TOKENS if own else evaluation.MAX_NEW_TOKENS),
        ranking_from,
    )
    with stage_progress() as progress:
        items = _items(data, chosen, limit, progress)
        results = evaluate_sides(bundle, against, items, settings, progress)
    if output is not None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in results.lines()]
        write_whole(output, "".join(lines), "--output")
    if as_json:
        say_json(results.to_json())
    else:
        stdout.print(evaluation_table(results))


def _items(data: Path | None, metric: Metric, limit: int | None, progress: Progress) -> list[Item]:
    from vtexport.measure.questions import heldout_items, read_items

    if data is None:
        return heldout_items(limit)
    progress.stage("read questions", data.stat().st_size if data.is_file() else None)
    return read_items(data, metric, limit, progress.advance)


COMMANDS = {"eval": evaluate}
