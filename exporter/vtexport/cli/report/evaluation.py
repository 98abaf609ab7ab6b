"""The output of `vtexport eval`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import make_table
from vtexport.measure.evaluate import Score
from vtexport.measure.sides import Results, Side


def evaluation_table(results: Results) -> RenderableType:
    """The table that `vtexport eval` prints, and under which conditions it holds."""
    this, *others = results.sides
    parts: list[RenderableType] = [_sides(this, others) if others else _scores(this.score), ""]
    if others:
        parts.append(_legend(results))
    else:
        parts.append(_speed(this.score))
    if len(this.score.by_keep) > 1:
        parts.append(_shares(this.score))
    return Group(*parts, _conditions(results))


def _scores(score: Score) -> RenderableType:
    """Scores by kind of question, of one bundle."""
    table = make_table("questions", "right", "of", "accuracy")
    for kind, (right, total) in score.by_kind.items():
        table.add_row(kind, _marks(right), str(total), f"{right / total:.1%}")
    table.add_row("all", _marks(sum(score.scores)), str(score.total), f"{score.accuracy:.1%}")
    return table


def _sides(this: Side, others: list[Side]) -> RenderableType:
    """One column per bundle: scores, the times beside them, and how the first bundle compares with each other one."""
    sides = [this, *others]
    table = make_table("", *(side.name for side in sides))
    for column in table.columns:
        column.overflow = "fold"
    table.add_row("method", *(side.method for side in sides))
    table.add_row("visual tokens", *(f"{side.score.mean_visual_tokens:.4g}" for side in sides))
    for kind in this.score.by_kind:
        pairs = [side.score.by_kind[kind] for side in sides]
        table.add_row(kind, *(f"{right / total:.1%}" for right, total in pairs))
    table.add_row("accuracy", *(f"{side.score.accuracy:.1%}" for side in sides))
    table.add_row("first token, ms", *(f"{side.score.first_token:.2f}" for side in sides))
    table.add_row("per token, ms", *(_milliseconds(side.score.per_token) for side in sides))
    found = [side.comparison for side in others if side.comparison is not None]
    table.add_row("difference, points", "", *(f"{100 * one.difference:+.1f}" for one in found))
    table.add_row("95% interval", "", *(f"{100 * one.low:+.1f} to {100 * one.high:+.1f}" for one in found))
    table.add_row("better on", "", *(str(one.better) for one in found))
    table.add_row("worse on", "", *(str(one.worse) for one in found))
    table.add_row("p", "", *(f"{one.p:.2g}" for one in found))
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
    shares = ", ".join(f"keep {keep:g} for {count / score.total:.0%}" for keep, count in score.by_keep.items())
    return f"{shares} of the questions, {score.mean_visual_tokens:.4g} visual tokens on average"


def _speed(score: Score) -> str:
    step = "" if score.per_token is None else f", {score.per_token:.2f} ms per token"
    return f"{score.mean_visual_tokens:.4g} visual tokens, {score.first_token:.2f} ms to the first token{step}"


def _marks(score: float) -> str:
    return f"{score:.1f}".removesuffix(".0")


def _milliseconds(spent: float | None) -> str:
    return "" if spent is None else f"{spent:.2f}"


def _conditions(results: Results) -> str:
    settings = results.settings
    return (
        f"{results.device}; metric {settings.metric.name}, {results.sides[0].score.total} questions, batch "
        f"{settings.batch}, at most {settings.max_new_tokens} new tokens; times are medians over the questions"
        + (
            "; bundles answer one after the other, vtexport profile compares their speed in turns"
            if results.sides[1:]
            else ""
        )
    )
