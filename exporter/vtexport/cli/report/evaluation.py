"""The output of `vtexport eval`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import make_table
from vtexport.measure.evaluate import Score
from vtexport.measure.sides import Results, Side


def evaluation_table(results: Results) -> RenderableType:
    """The tables that `vtexport eval` prints."""
    this, *others = results.sides
    parts: list[RenderableType] = [_scores(this.score) if not others else _sides(results.sides)]
    if others:
        parts += ["", _comparisons(this, others), "", _legend(results)]
    if len(this.score.by_keep) > 1:
        parts += ["", _shares(this.score)]
    if not others:
        parts += ["", _speed(this.score)]
    return Group(*parts, _conditions(results))


def _scores(score: Score) -> RenderableType:
    """Scores by kind of question, of one bundle."""
    table = make_table("questions", "right", "of", "accuracy")
    for kind, (right, total) in score.by_kind.items():
        table.add_row(kind, _marks(right), str(total), f"{right / total:.1%}")
    table.add_row("all", _marks(sum(score.scores)), str(score.total), f"{score.accuracy:.1%}")
    return table


def _sides(sides: tuple[Side, ...]) -> RenderableType:
    """One row per bundle: scores, and the times beside them."""
    kinds = list(sides[0].score.by_kind)
    table = make_table("bundle", "method", "visual tokens", *kinds, "accuracy", "first token, ms", "per token, ms")
    for side in sides:
        by_kind = [f"{right / total:.1%}" for right, total in side.score.by_kind.values()]
        table.add_row(
            side.name,
            side.method,
            f"{side.score.mean_visual_tokens:.4g}",
            *by_kind,
            f"{side.score.accuracy:.1%}",
            f"{side.score.first_token:.2f}",
            _milliseconds(side.score.per_token),
        )
    return table


def _comparisons(this: Side, others: list[Side]) -> RenderableType:
    """One row per other bundle: how the first one compares with it."""
    table = make_table(f"{this.name} against", "difference", "95% interval", "better on", "worse on", "p")
    for side in others:
        found = side.comparison
        assert found is not None, "every side but the first is compared with it"
        table.add_row(
            side.name,
            f"{100 * found.difference:+.1f} points",
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
            str(found.better),
            str(found.worse),
            f"{found.p:.2g}",
        )
    return table


def _legend(results: Results) -> str:
    this, *others = results.sides
    assert others[0].comparison is not None, "every side but the first is compared with it"
    meaning = "a higher score" if results.settings.metric.graded else "the only right answer of the two"
    return f"better on: questions to which {this.name} gave {meaning}; worse on: the other bundle; p: {others[0].comparison.test}"


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
        f"{settings.batch}, at most {settings.max_new_tokens} new tokens; times are medians over the questions, bundles "
        "answer one after the other"
    )
