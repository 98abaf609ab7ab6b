"""A bundle whose decoder ranks visual tokens, for another bundle that prunes by the ranking (method sgl)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtexport.errors import InputError
from vtexport.models.conversation import Question
from vtexport.pruning import PruningPlan
from vtexport.pruning.sgl import Ranking
from vtexport.runtime.request import Request

if TYPE_CHECKING:
    from vtexport.runtime.runner import Runner


def check_needed(plan: PruningPlan, given: Sequence[str]) -> None:
    """Refuse a ranking that nothing would read.

    Raises:
        InputError: `given`, the inputs that the methods of `plan` take from another bundle, lists no ranking.
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
        self._runner, ranking_folder = runner, runner.bundle.folder
        if not runner.bundle.manifest.gives_ranking:
            raise InputError(f"{ranking_folder} gives no ranking; build it with --method dense --give-ranking")
        (stage,) = plan.decoder_stages.values()
        if runner.plan.num_visual_tokens != stage.tokens_in:
            raise InputError(
                f"{ranking_folder} ranks {runner.plan.num_visual_tokens} visual tokens but {stage.tokens_in} enter "
                f"{folder}'s pruning layer; give a model with the same visual tokens"
            )

    def ranked(
        self, requests: Sequence[Request], pairs: Sequence[tuple[Any, Question]], max_new_tokens: int
    ) -> list[Request]:
        """`requests` with the ranking that the ranking bundle gives while it answers the same pairs."""
        ranking_requests = [self._runner.request(*pair) for pair in pairs]
        results, _ = self._runner.generate(ranking_requests, self._runner.decoding(max_new_tokens))
        completed = []
        for request, result in zip(requests, results, strict=True):
            assert result.ranking is not None, "a build that gives its ranking gives one for every row"
            completed.append(replace(request, extras={**request.extras, Ranking.name: result.ranking}))
        return completed
