"""The output of `vtexport eval`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import Paragraph, Table
from vtexport.figures import fixed, milliseconds, number, percent, points, probability
from vtexport.measure.evaluate import Score
from vtexport.measure.sides import Results, Side


def evaluation_table(results: Results) -> RenderableType:
    """The table that `vtexport eval` prints, and under which conditions it holds."""
    this, *others = results.sides
    parts: list[RenderableType] = [_sides(this, others) if others else _scores(this.score), ""]
    if others:
        parts.append(Paragraph(_legend(results)))
    else:
        parts.append(Paragraph(_speed(this.score)))
    if len(this.score.by_keep) > 1:
        parts.append(Paragraph(_shares(this.score)))
    return Group(*parts, Paragraph(_conditions(results)))


def _scores(score: Score) -> RenderableType:
    """Scores by kind of question, of one bundle."""
    table = Table("questions", "right", "of", "accuracy")
    for kind, (right, total) in score.by_kind.items():
        table.add_row(kind, _marks(right), number(total), percent(right / total))
    table.add_row("all", _marks(sum(score.scores)), number(score.total), percent(score.accuracy))
    return table


def _sides(this: Side, others: list[Side]) -> RenderableType:
    """One column per bundle: scores, the times beside them, and how the first bundle compares with each other one."""
    sides = [this, *others]
    table = Table("", *(side.name for side in sides))
    table.add_row("method", *(side.method for side in sides))
    table.add_row("visual tokens", *(number(side.score.mean_visual_tokens) for side in sides))
    for kind in this.score.by_kind:
        pairs = [side.score.by_kind[kind] for side in sides]
        table.add_row(kind, *(percent(right / total) for right, total in pairs))
    table.add_row("accuracy", *(percent(side.score.accuracy) for side in sides))
    table.add_row("first token, ms", *(milliseconds(side.score.first_token) for side in sides))
    table.add_row("per token, ms", *(_milliseconds(side.score.per_token) for side in sides))
    found = [side.comparison for side in others if side.comparison is not None]
    table.add_row("difference, points", "", *(points(one.difference) for one in found))
    table.add_row("95% interval", "", *(f"{points(one.low)} to {points(one.high)}" for one in found))
    table.add_row("better on", "", *(number(one.better) for one in found))
    table.add_row("worse on", "", *(number(one.worse) for one in found))
    table.add_row("p", "", *(probability(one.p) for one in found))
    return table


def _legend(results: Results) -> str:
    this, *others = results.sides
    tests = {side.comparison.test for side in others if side.comparison is not None}
    meaning = "a higher score" if results.settings.metric.graded else "the only right answer of the two"
    return (
        f"difference: {this.name} minus the other bundle; better on: questions to which it gave {meaning}, worse on: to which "
        f"the other did; p: {', '.join(sorted(tests))}"
    )


def _shares(score: Score) -> str:
    shares = ", ".join(
        f"keep {number(keep)} for {percent(count / score.total, 0)}" for keep, count in score.by_keep.items()
    )
    return f"{shares} of the questions, {number(score.mean_visual_tokens)} visual tokens on average"


def _speed(score: Score) -> str:
    step = "" if score.per_token is None else f", {milliseconds(score.per_token)} ms per token"
    return f"{number(score.mean_visual_tokens)} visual tokens, {milliseconds(score.first_token)} ms to the first token{step}"


def _marks(score: float) -> str:
    return fixed(score).removesuffix(".0")


def _milliseconds(spent: float | None) -> str:
    return "" if spent is None else milliseconds(spent)


def _conditions(results: Results) -> str:
    settings = results.settings
    return (
        f"{results.device}; metric {settings.metric.name}, {number(results.sides[0].score.total)} questions, batch "
        f"{settings.batch}, at most {settings.max_new_tokens} new tokens; times are medians over the questions"
        + (
            "; bundles answer one after the other, vtexport profile compares their speed in turns"
            if results.sides[1:]
            else ""
        )
    )
