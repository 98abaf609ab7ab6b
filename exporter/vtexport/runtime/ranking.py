"""A bundle whose decoder ranks the visual tokens that another bundle prunes by (method sgl)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtexport.errors import InputError
from vtexport.pruning import PruningPlan
from vtexport.pruning.sgl import Ranking
from vtexport.runtime.request import Request

if TYPE_CHECKING:
    from vtexport.runtime.runner import Runner


def check_needed(plan: PruningPlan, given: Sequence[str]) -> None:
    """Refuse a ranking that nothing would read.

    Raises:
        InputError: `given`, what the methods of `plan` have from another bundle, names none.
    """
    if Ranking.name not in given:
        raise InputError(f"--ranking-from has no effect with method {plan.method}; leave it out")


class Ranker:
    """The bundle that ranks.

    Args:
        runner: the bundle, opened.
        plan: the plan that prunes by its ranking.
        folder: the bundle of that plan, for messages.

    Raises:
        InputError: the bundle gives no ranking, or one of another length.
    """

    def __init__(self, runner: Runner, plan: PruningPlan, folder: Path) -> None:
        self._runner, own = runner, runner.bundle.folder
        if not runner.bundle.manifest.gives_ranking:
            raise InputError(f"{own} gives no ranking; build it with --method dense --give-ranking")
        (stage,) = plan.decoder_stages.values()
        if runner.plan.num_visual_tokens != stage.tokens_in:
            raise InputError(
                f"{own} ranks {runner.plan.num_visual_tokens} visual tokens but {stage.tokens_in} enter {folder}'s "
                "pruning layer; give a model with the same visual tokens"
            )

    def ranked(
        self, requests: Sequence[Request], pairs: Sequence[tuple[Any, str]], max_new_tokens: int
    ) -> list[Request]:
        """`requests` with what the ranking bundle attended to while it answered the same pairs."""
        own = [self._runner.request(*pair) for pair in pairs]
        results, _ = self._runner.generate(own, self._runner.decoding(max_new_tokens))
        completed = []
        for request, result in zip(requests, results, strict=True):
            assert result.ranking is not None, "a build that gives its ranking gives one for every row"
            completed.append(replace(request, extras={**request.extras, Ranking.name: result.ranking}))
        return completed
