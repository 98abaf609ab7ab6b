"""The passes of a calibration over all pairs: batch by batch, with results kept between runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import InputError
from vtexport.measure.calibration.batches import Batch, Measured, batch_size
from vtexport.measure.calibration.partial import Partial, content_of, key_of
from vtexport.models.prompt import Prompt, Prompter
from vtexport.progress import Progress
from vtexport.pruning import Geometry, PruningPlan, make_plan

if TYPE_CHECKING:
    from vtexport.check.batched import BatchedModel
    from vtexport.measure.calibrate import Pair


@dataclass(frozen=True)
class Subjects:
    """The pairs to measure: prompts and a hash of each one's image files. Images are opened when their turn comes."""

    prompter: Prompter
    pairs: Sequence[Pair]
    prompts: Sequence[Prompt]
    contents: Sequence[str]

    @classmethod
    def of(cls, pairs: Sequence[Pair], prompter: Prompter) -> Subjects:
        """The subjects of `pairs`.

        Raises:
            InputError: an image that cannot be read, or a prompt that cannot be used; no pair is measured then.
        """
        prompts = []
        for pair in pairs:
            prompts.append(prompter.prompt(pair.prompt))
            if prompts[-1].num_after < 1:
                raise InputError(
                    f"the prompt {pair.prompt!r} has no text after its image, which could rate; give another"
                )
            prompter.open_pictures(pair.images)
        return cls(prompter, pairs, prompts, [content_of(pair.images) for pair in pairs])


class Passes:
    """What to do with every pair, and with which model.

    Args:
        model: the model.
        subjects: the pairs.
        fingerprint: of the model.
        kept: where results are kept.
        progress: told of every pair of every pass.
    """

    def __init__(
        self, model: BatchedModel, subjects: Subjects, fingerprint: str, kept: Partial, progress: Progress
    ) -> None:
        self._model, self._subjects, self._kept, self._progress = model, subjects, kept, progress
        self._facts = (fingerprint, str(model.spec.views))
        self._size = batch_size(model.spec, max(len(prompt.token_ids) for prompt in subjects.prompts))
        self.plan: Callable[..., PruningPlan] = partial(make_plan, geometry=Geometry.of(model.spec))
        self._dense = self.plan("dense", keep=1.0)

    def measure(self, *, answers: bool) -> list[Measured]:
        """Every pair on the dense model; `answers` and errors as in `Batch.measure`."""
        layers = self._model.spec.decoder.num_layers
        exits = {number: self.plan("exit", keep=None, options={"layers": str(number)}) for number in range(layers - 1)}

        def fits(pair: Measured) -> bool:
            lists = pair.ranks, pair.mass, pair.changed
            return all(len(values) == layers for values in lists) and bool(pair.answer) == answers

        def run(batch: Batch, _part: slice) -> list[Measured]:
            return batch.measure(exits, answers=answers)

        return self._each("measure pairs", ["measure", answers], Measured, fits, run)

    def chances(self, plans: Sequence[PruningPlan], measured: Sequence[Measured]) -> Array:
        """[pairs, plans, 2]: the likelihood of the dense model's next token, and whether (1 or 0) it stays the next."""

        def run(batch: Batch, part: slice) -> list[list[tuple[float, bool]]]:
            tokens = [values.token for values in measured[part]]
            found = dict(batch.logits(plans, [()] * len(tokens), partial(_chances, tokens)))
            return [[found[number][pair] for number in range(len(plans))] for pair in range(len(tokens))]

        return self._of_plans("try pruning layers", plans, tuple[float, bool], run)

    def unchanged(self, plans: Sequence[PruningPlan], measured: Sequence[Measured]) -> Array:
        """[pairs, plans] bool: whether the dense answer, all its tokens, stays the same under each plan."""

        def run(batch: Batch, part: slice) -> list[list[bool]]:
            answers = [values.answer for values in measured[part]]
            new_tokens = [answer[:-1] for answer in answers]
            found = dict(batch.logits(plans, new_tokens, partial(_unchanged, answers)))
            return [[found[number][pair] for number in range(len(plans))] for pair in range(len(answers))]

        return self._of_plans("try methods", plans, bool, run)

    def _of_plans(
        self, text: str, plans: Sequence[PruningPlan], kind: Any, run: Callable[[Batch, slice], Any]
    ) -> Array:
        def fits(values: list[Any]) -> bool:
            return len(values) == len(plans)

        return np.array(self._each(text, [text, *map(str, plans)], list[kind], fits, run))

    def _each(
        self,
        text: str,
        facts: Sequence[object],
        kind: Any,
        fits: Callable[[Any], bool],
        run: Callable[[Batch, slice], list[Any]],
    ) -> list[Any]:
        """One pass: a result of the type `kind` that `fits`, for every pair.

        Args:
            text: what progress calls it.
            facts: what its results depend on besides model and pairs.
            kind: the type of a pair's result.
            fits: whether a kept result has the right lengths.
            run: the results of a batch, for the pairs of a slice.
        """
        pairs, results = self._subjects, list[Any]()
        self._progress.stage(text, len(pairs.prompts))
        for first in range(0, len(pairs.prompts), self._size):
            part = slice(first, first + self._size)
            prompts, number = pairs.prompts[part], len(pairs.prompts[part])
            key = key_of(*self._facts, *facts, [prompt.text for prompt in prompts], pairs.contents[part])
            found = self._kept.take(key, list[kind], partial(_all_fit, number, fits))
            if found is None:
                views = [pairs.prompter.views(pairs.prompter.open_pictures(p.images)) for p in pairs.pairs[part]]
                found = run(Batch(self._model, self._dense, prompts, views), part)
                self._kept.keep(key, found)
            results += found
            self._progress.advance(number)
        return results


def _all_fit(number: int, fits: Callable[[Any], bool], results: Sequence[Any]) -> bool:
    """Whether these are results of `number` pairs, each of which fits."""
    return len(results) == number and all(map(fits, results))


def _chances(tokens: Sequence[int], logits: Array) -> list[tuple[float, bool]]:
    """For each pair, the probability of its token by logits [B, 1, vocabulary], and whether it is the greedy one."""
    found = []
    for token, of_pair in zip(tokens, logits[:, 0].astype(np.float64), strict=True):
        weights = np.exp(of_pair - of_pair.max())
        found.append((float(weights[token] / weights.sum()), int(of_pair.argmax()) == token))
    return found


def _unchanged(answers: Sequence[list[int]], logits: Array) -> list[bool]:
    """For each pair, whether the logits [B, 1 + n, vocabulary] give its answer again."""
    best = logits.argmax(axis=2)
    return [answer == row[: len(answer)].tolist() for answer, row in zip(answers, best, strict=True)]
