"""An opened bundle: images and questions in, answers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from vtexport.arrays import Array
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError, NumericError, TargetError
from vtexport.models.conversation import Question, asked
from vtexport.models.prompt import Prompter
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.runtime.answer import Answer, stage_reports
from vtexport.runtime.generate import Generation, generate
from vtexport.runtime.inputs import admit, prefill_input, visual_lengths
from vtexport.runtime.numeric import checked
from vtexport.runtime.ranking import Ranker, check_needed
from vtexport.runtime.request import Decoding, Embedded, Request, Result, Timings, check_new_tokens, check_pairs
from vtexport.runtime.text import TextStream
from vtexport.runtime.vision_cache import DEFAULT_BYTES, VisionCache
from vtexport.targets.base import Compiled
from vtexport.targets.engine import Selector, VisionOutput

#: default maximum of tokens per answer
MAX_NEW_TOKENS = 64


class Runner:
    """An opened bundle, ready to answer; see `Runner.open`."""

    def __init__(
        self, bundle: Bundle, threads: int = 0, ranking_from: Bundle | None = None, vision_cache: int = DEFAULT_BYTES
    ) -> None:
        """Open `bundle` on its target.

        Args:
            bundle: the bundle.
            threads: threads of the runtime; 0 leaves the number to it.
            ranking_from: the bundle that ranks visual tokens, for a method such as sgl.
            vision_cache: bytes to keep of the vision stage's outputs of recent images, for another question; 0 for none.

        Raises:
            TargetError: the target cannot run here.
            InputError: a ranking has no effect, or is of another length.
        """
        manifest = bundle.manifest
        target = bundle.target()
        available = target.can_run()
        if not available.works:
            raise TargetError(f"{bundle.folder} cannot run here: {available.reason}")
        self.bundle = bundle
        self.plans: list[PruningPlan] = manifest.pruning_plans()
        self.policy = manifest.policy()
        compiled = Compiled(manifest.target.graphs, manifest.target.versions, manifest.target.facts)
        self.engine = target.open(bundle.folder, compiled, self.plans, threads)
        self._vision = VisionCache(vision_cache)
        self.spec = bundle.spec()
        self.prompter = Prompter(bundle.processor_folder, self.spec)
        extras = [extra for part in self.plan.methods.parts for extra in part.extras]
        makers = {extra.name: extra.of_questions(bundle.processor_folder, self.spec) for extra in extras}
        self._makers = {name: maker for name, maker in makers.items() if maker is not None}
        #: names of the inputs that another bundle must give for every request
        self.given = [name for name, maker in makers.items() if maker is None]
        self._ranker: Ranker | None = None
        if ranking_from is not None:
            check_needed(self.plan, self.given)
            ranking = Runner(ranking_from, threads, vision_cache=vision_cache)
            self._ranker = Ranker(ranking, self.plan, bundle.folder)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        threads: int = 0,
        ranking_from: Path | str | None = None,
        vision_cache: int = DEFAULT_BYTES,
    ) -> Runner:
        """Open the bundle in `folder`.

        Args:
            folder: a bundle.
            threads: see `__init__`.
            ranking_from: a bundle that ranks visual tokens, for a method such as sgl.
            vision_cache: bytes of the vision stage's outputs to keep of recent images; 0 for none.

        Raises:
            BundleError: no bundle, or a damaged one.
            TargetError: its target cannot run here.
            InputError: a ranking has no effect, or is of another length.
        """
        ranking = None if ranking_from is None else Bundle.open(ranking_from)
        return cls(Bundle.open(folder), threads, ranking, vision_cache)

    @property
    def plan(self) -> PruningPlan:
        """The plan; if there are several, the one with the most tokens."""
        return self.plans[0]

    @property
    def reads_question(self) -> bool:
        """Whether the vision stage itself reads the question."""
        return bool(self._makers)

    def request(self, image: Any, question: Question) -> Request:
        """The request that asks `question`, or a conversation's last one, about `image`; see `ask`."""
        prompt = self.prompter.prompt(question)
        extras = {name: maker(asked(question)) for name, maker in self._makers.items()}
        return Request(prompt, self.prompter.views(image), extras)

    def need_language_model(self) -> None:
        """Refuse a bundle that cannot answer, because it holds a vision engine alone.

        Raises:
            InputError: the bundle has no language model.
        """
        if not self.bundle.manifest.has_language_model:
            raise InputError(
                f"{self.bundle.folder} holds a vision engine alone, for {self.bundle.manifest.target.name}; see "
                "docs/tensorrt-llm.md"
            )

    def ask(
        self,
        pairs: Sequence[tuple[Any, Question]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer (image, question) pairs as one batch.

        Args:
            pairs: an image (PIL; several, or the frames of a video, as a list) and a question each, or the messages of a
                conversation (`vtexport.models.conversation.turns`).
            max_new_tokens: tokens per answer at most.
            on_token: called with (row, token) as tokens come.

        Returns:
            an answer per pair, in their order.

        Raises:
            InputError: an image or a question that the bundle cannot take, or a bundle without a language model.
        """
        self.need_language_model()
        check_pairs(pairs)
        max_new_tokens = check_new_tokens(max_new_tokens)
        self.engine.load()
        start = time.perf_counter()
        requests = [self.request(image, question) for image, question in pairs]
        spent = {"preprocess": 1000 * (time.perf_counter() - start)}
        if self.given:
            start = time.perf_counter()
            requests = self._completed(requests, pairs, max_new_tokens)
            spent["ranking"] = 1000 * (time.perf_counter() - start)
        results, timings = self.generate(requests, self.decoding(max_new_tokens), on_token)
        return [
            self._answer(result, request.views, {**spent, **_milliseconds(times)})
            for result, request, times in zip(results, requests, timings, strict=True)
        ]

    def stream(self, image: Any, question: Question, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """Answer one question, yielding its text piece by piece as it is made.

        Args:
            image: a PIL image; several, or the frames of a video, as a list.
            question: the question, or the messages of a conversation.
            max_new_tokens: tokens at most.

        Raises:
            InputError: as `ask`.
        """
        self.need_language_model()
        max_new_tokens = check_new_tokens(max_new_tokens)
        requests = [self.request(image, question)]
        if self.given:
            requests = self._completed(requests, [(image, question)], max_new_tokens)
        decoding, text = self.decoding(max_new_tokens), TextStream(self.prompter)
        admit(self.engine, requests, decoding)
        vision = self.look(requests)
        bucket = int(self.buckets(vision)[0])
        generation = Generation(self.engine, self.plans[bucket], requests, decoding, bucket=bucket, vision=vision)
        for tokens in generation:
            if piece := text.add(tokens[0]):
                yield piece
        if piece := text.rest():
            yield piece

    def embed(self, pairs: Sequence[tuple[Any, Question]]) -> list[Embedded]:
        """Run the vision stage alone, to give prompts and visual tokens to a language model that runs elsewhere.

        Raises:
            InputError: the bundle prunes inside the decoder.
        """
        selects = "select" in self.bundle.manifest.graphs
        if self.plan.decoder_stages and not selects:
            raise InputError(
                f"{self.bundle.folder} prunes inside the decoder (method {self.plan.method}), so its visual tokens "
                "alone do not carry the pruning; build with a vision-stage method such as fastervlm"
            )
        requests = [self.request(image, question) for image, question in pairs]
        vision = self.look(requests)
        if selects:
            return self._selected(requests, pairs, vision)
        embedded = []
        for row, bucket in enumerate(map(int, self.buckets(vision))):
            lengths = visual_lengths(self.plans[bucket], vision, requests)[row]
            visual, ends = np.asarray(vision.seen(bucket).visual[row]), np.cumsum(lengths)
            images = [visual[end - count : end] for end, count in zip(ends, lengths, strict=True)]
            embedded.append(Embedded(requests[row].prompt.text, pairs[row][1], images, self.prompter.mark))
        return checked(embedded)

    def _selected(
        self, requests: Sequence[Request], pairs: Sequence[tuple[Any, Question]], vision: VisionOutput
    ) -> list[Embedded]:
        """As `embed`, of the tokens that the decoder's first layers choose."""
        chosen = cast(Selector, self.engine).select(prefill_input(self.plan, requests, vision))
        embedded = []
        for row, request in enumerate(requests):
            tokens = chosen.chosen[row]
            counts = [len(tokens)] if chosen.length is None else chosen.length[row].tolist()
            ends = np.cumsum(counts)
            images = [tokens[end - count : end] for end, count in zip(ends, counts, strict=True)]
            embedded.append(Embedded(request.prompt.text, pairs[row][1], images, self.prompter.mark))
        return checked(embedded)

    def look(self, requests: Sequence[Request]) -> VisionOutput:
        """The vision graph on the images of `requests`; of images seen lately, its outputs are kept."""
        return self._vision.look(self.engine, self.plan, requests)

    def buckets(self, vision: VisionOutput) -> Array:
        """The number of the plan that each row of `vision` gets, [B] int64."""
        if self.policy is None:
            return np.zeros(len(next(iter(vision.arrays.values()))), dtype=np.int64)
        return self.policy.choose(vision.spread)

    def decoding(self, max_new_tokens: int) -> Decoding:
        """Decoding up to the model's own end tokens and positions."""
        model = self.bundle.manifest.model
        return Decoding(max_new_tokens, model.max_positions, model.eos_token_ids)

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        on_token: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Result], list[Timings]]:
        """`vtexport.runtime.generate.generate` with this bundle's engine and plans.

        With several plans, the vision graph runs once, and rows with the same plan go on as one batch.

        Results are in the order of `requests`, each with the timings of the batch that it was in.
        """
        admit(self.engine, requests, decoding)
        start = time.perf_counter()
        vision = self.look(requests)
        looked = 1000 * (time.perf_counter() - start)
        if self.policy is None:
            results, timings = generate(self.engine, self.plan, requests, decoding, on_token=on_token, vision=vision)
            return results, [replace(timings, vision=looked)] * len(results)
        chosen, answered = self.buckets(vision), {}
        for bucket in map(int, np.unique(chosen)):
            rows = [int(row) for row in np.flatnonzero(chosen == bucket)]
            try:
                results, timings = generate(
                    self.engine,
                    self.plans[bucket],
                    [requests[row] for row in rows],
                    decoding,
                    on_token=_renumbered(on_token, rows),
                    bucket=bucket,
                    vision=vision.rows(np.array(rows)),
                )
            except NumericError as error:
                raise NumericError(error.fault, rows[error.row]) from error
            for row, result in zip(rows, results, strict=True):
                result.spread = float(vision.spread[row])
                answered[row] = result, replace(timings, vision=looked)
        ordered = [answered[row] for row in range(len(requests))]
        return [result for result, _ in ordered], [timings for _, timings in ordered]

    def _completed(
        self, requests: Sequence[Request], pairs: Sequence[tuple[Any, Question]], max_new_tokens: int
    ) -> list[Request]:
        """`requests` with the inputs that the ranking bundle gives for the same pairs."""
        if self._ranker is None:
            raise InputError(
                f"{self.bundle.folder} prunes by another bundle's ranking; give that bundle as --ranking-from"
            )
        return self._ranker.ranked(requests, pairs, max_new_tokens)

    def _answer(self, result: Result, views: Views, times: dict[str, float | None]) -> Answer:
        plan = self.plans[result.bucket]
        return Answer(
            text=self.prompter.decode(result.token_ids),
            token_ids=result.token_ids,
            keep=plan.keep,
            spread=None if result.spread is None else round(result.spread, 3),
            visual_tokens={
                "total": plan.num_visual_tokens,
                "mean": plan.mean_visual_tokens,
                "mean_sparsevlm_count": plan.mean_visual_tokens_sparsevlm,
            },
            stages=stage_reports(plan, self.bundle.manifest.model.grid, result.kept, views),
            timings_ms={name: None if spent is None else round(spent, 3) for name, spent in times.items()},
            debug=result.debug,
        )


def _renumbered(on_token: Callable[[int, int], None] | None, rows: Sequence[int]) -> Callable[[int, int], None] | None:
    """`on_token` for a batch that consists of `rows` of a larger one."""
    return None if on_token is None else lambda row, token: on_token(rows[row], token)


def _milliseconds(timings: Timings) -> dict[str, float | None]:
    return {"vision": timings.vision, "prefill": timings.prefill, "per_token": timings.per_token}
