"""Images and questions in, answers out, over any bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.bundle.folder import Bundle
from vtexport.errors import InputError, TargetError
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import ClipTokenizer
from vtexport.models.prompt import Prompter
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan, methods_of
from vtexport.runtime.generate import Request, Result, Timings, generate, look, visual_lengths
from vtexport.targets import get_target
from vtexport.targets.base import Compiled


@dataclass(frozen=True)
class StageReport:
    """What one stage did with one image.

    Attributes:
        where: the stage.
        tokens_in: visual tokens that entered it.
        kept: tokens that survived as they were.
        recycled: tokens made by merging others.
        index: the kept tokens, as indices into the stage's input.
        grid: for each token that leaves the stage the (row, column) of its image cell, of several views (view, row,
            column); None where it has none.
    """

    where: str
    tokens_in: int
    kept: int
    recycled: int
    index: list[int]
    grid: list[tuple[int, ...] | None]


@dataclass(frozen=True)
class Answer:
    """One answer, and how it came about.

    Attributes:
        text: the answer.
        token_ids: its tokens, the end token included if it came.
        keep: the keep ratio that this image got.
        spread: by what it was chosen, of a build with `--keep auto`: how many patches share CLS's attention.
        visual_tokens: see README.
        stages: what each stage did.
        timings_ms: of the rows that ran together: all of a batch, or with `--keep auto` those of equal keep ratio
            (vision always all).
    """

    text: str
    token_ids: list[int]
    keep: float
    spread: float | None
    visual_tokens: dict[str, float]
    stages: list[StageReport]
    timings_ms: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """The object that `vtexport run --json` prints."""
        data = asdict(self)
        for stage in data["stages"]:
            stage["in"] = stage.pop("tokens_in")
        return data


@dataclass(frozen=True)
class Embedded:
    """A prompt whose images have been seen: its text with a mark for each, the question in it, their tokens [K, C]."""

    text: str
    question: str
    images: list[Array]


class Runner:
    """An opened bundle, ready to answer."""

    def __init__(self, bundle: Bundle, threads: int = 0, ranking_from: Bundle | None = None) -> None:
        """Open `bundle` on its target.

        Args:
            bundle: the bundle.
            threads: threads of the runtime; 0 leaves the number to it.
            ranking_from: the bundle that ranks visual tokens for method sgl.

        Raises:
            TargetError: the target cannot run here.
            InputError: a ranking is missing, has no effect, or is of another length.
        """
        manifest = bundle.manifest
        target = get_target(manifest.target.name)
        available = target.can_run()
        if not available.works:
            raise TargetError(f"{bundle.folder} cannot run here: {available.reason}")
        self.bundle = bundle
        self.plans: list[PruningPlan] = manifest.pruning_plans()
        self.policy = manifest.policy()
        compiled = Compiled(manifest.target.graphs, manifest.target.versions, manifest.target.facts)
        self.engine = target.open(bundle.folder, compiled, threads)
        self.spec = bundle.spec()
        self.prompter = Prompter(bundle.processor_folder, self.spec)
        vision, _ = methods_of(self.plan.method)
        self.questions = None
        if vision.reads_question:
            assert self.spec.clip is not None, "a build with such a method writes its CLIP's files"
            self.questions = ClipTokenizer(bundle.processor_folder / CLIP_FOLDER, self.spec.clip.length)
        self.ranker = None if ranking_from is None else self._ranker(ranking_from, threads)

    def _ranker(self, bundle: Bundle, threads: int) -> Runner:
        if not self.needs_ranking:
            raise InputError(f"--ranking-from has no effect with method {self.plan.method}; leave it out")
        ranker, (stage,) = Runner(bundle, threads), self.plan.decoder_stages.values()
        if not bundle.manifest.gives_ranking:
            raise InputError(f"{bundle.folder} gives no ranking; build it with --method dense --give-ranking")
        if ranker.plan.num_visual_tokens != stage.tokens_in:
            raise InputError(
                f"{bundle.folder} ranks {ranker.plan.num_visual_tokens} visual tokens but {stage.tokens_in} enter "
                f"{self.bundle.folder}'s pruning layer; give a model with the same visual tokens"
            )
        return ranker

    @property
    def plan(self) -> PruningPlan:
        """The plan; of several, the one of most tokens."""
        return self.plans[0]

    @property
    def needs_ranking(self) -> bool:
        """Whether the bundle prunes by another one's ranking."""
        _, decoder = methods_of(self.plan.method)
        return decoder is not None and decoder.raters == "given"

    @classmethod
    def open(cls, folder: Path, threads: int = 0, ranking_from: Path | None = None) -> Runner:
        """Open the bundle in `folder`; see `Bundle.open` and `Runner`."""
        return cls(Bundle.open(folder), threads, None if ranking_from is None else Bundle.open(ranking_from))

    def request(self, image: Any, question: str) -> Request:
        """The request that asks `question` about `image`, a PIL image or several; see `Prompter.views`."""
        ids = None if self.questions is None else self.questions.ids(question)
        return Request(self.prompter.prompt(question), self.prompter.views(image), question_ids=ids)

    def need_language_model(self) -> None:
        """Refuse to answer with a vision engine alone.

        Raises:
            InputError: that is all the bundle holds.
        """
        if "decode" not in self.bundle.manifest.graphs:
            raise InputError(
                f"{self.bundle.folder} holds a vision engine alone, for {self.bundle.manifest.target.name}; see README, "
                "Deploying LLaVA-1.5-7B"
            )

    def embed(self, pairs: Sequence[tuple[Any, str]]) -> list[Embedded]:
        """The vision stage alone: prompts and their images' tokens, for a language model that runs elsewhere.

        Raises:
            InputError: the bundle prunes inside the decoder.
        """
        if self.plan.decoder_stages:
            raise InputError(
                f"{self.bundle.folder} prunes inside the decoder (method {self.plan.method}), so its visual tokens alone are "
                "not what it answers from; build with a vision-stage method such as fastervlm"
            )
        requests = [self.request(image, question) for image, question in pairs]
        vision = look(self.engine, self.plan, requests)
        chosen = [0] * len(requests) if self.policy is None else self.policy.choose(vision.spread)
        found = []
        for row, (request, (_, question)) in enumerate(zip(requests, pairs, strict=True)):
            bucket = int(chosen[row])
            lengths = visual_lengths(self.plans[bucket], vision, requests)[row]
            visual, ends = vision.seen(bucket).visual[row], np.cumsum(lengths)
            images = [visual[end - count : end] for end, count in zip(ends, lengths, strict=True)]
            found.append(Embedded(request.prompt.text, question, images))
        return found

    def ask(
        self,
        pairs: Sequence[tuple[Any, str]],
        max_new_tokens: int = 64,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer (image, question) pairs as one batch; see `vtexport.generate.generate`.

        Raises:
            InputError: the bundle holds no language model.
        """
        self.need_language_model()
        self.engine.load()
        start = time.perf_counter()
        requests = [self.request(image, question) for image, question in pairs]
        preprocess = 1000 * (time.perf_counter() - start)
        ranking: float | None = None
        if self.needs_ranking:
            start = time.perf_counter()
            requests = self._ranked(requests, pairs, max_new_tokens)
            ranking = 1000 * (time.perf_counter() - start)
        results, timings = self.generate(requests, max_new_tokens, on_token)
        return [
            self._answer(result, request.views, _milliseconds(preprocess, ranking, times))
            for result, request, times in zip(results, requests, timings, strict=True)
        ]

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
            timings_ms=times,
        )

    def generate(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        on_token: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Result], list[Timings]]:
        """`vtexport.generate.generate` with this bundle's engine, plans, end tokens and positions.

        With several plans the images are looked at once, and rows of equal plan go on as one batch.

        Returns:
            results in the order of `requests`, and the timings of the batch that each was in.
        """
        model = self.bundle.manifest.model
        answer = partial(generate, self.engine, eos_token_ids=model.eos_token_ids, max_positions=model.max_positions)
        if self.policy is None:
            results, timings = answer(self.plan, requests, max_new_tokens, on_token=on_token)
            return results, [timings] * len(results)
        start = time.perf_counter()
        vision = look(self.engine, self.plan, requests)
        looked = 1000 * (time.perf_counter() - start)
        chosen, found = self.policy.choose(vision.spread), {}
        for bucket in np.unique(chosen):
            rows = [int(row) for row in np.flatnonzero(chosen == bucket)]
            results, timings = answer(
                self.plans[bucket],
                [requests[row] for row in rows],
                max_new_tokens,
                on_token=_renumbered(on_token, rows),
                bucket=int(bucket),
                vision=vision.rows(np.array(rows)),
            )
            for row, result in zip(rows, results, strict=True):
                result.spread = float(vision.spread[row])
                found[row] = result, replace(timings, vision=looked)
        return [found[row][0] for row in range(len(requests))], [found[row][1] for row in range(len(requests))]

    def _ranked(
        self, requests: Sequence[Request], pairs: Sequence[tuple[Any, str]], max_new_tokens: int
    ) -> list[Request]:
        """`requests` with what the ranking bundle attended to while it answered the same pairs."""
        if self.ranker is None:
            raise InputError(
                f"{self.bundle.folder} prunes by another bundle's ranking; give that bundle as --ranking-from"
            )
        results, _ = self.ranker.generate([self.ranker.request(*pair) for pair in pairs], max_new_tokens)
        return [replace(request, ranking=found.ranking) for request, found in zip(requests, results, strict=True)]


def _renumbered(on_token: Callable[[int, int], None] | None, rows: Sequence[int]) -> Callable[[int, int], None] | None:
    """`on_token` for some rows of a batch."""
    return None if on_token is None else lambda row, token: on_token(rows[row], token)


def stage_reports(plan: PruningPlan, grid: int, kept: Mapping[str, Array], views: Views) -> list[StageReport]:
    """What `plan` did with the images `views`, given the kept indices of each stage by its name (`Result.kept`)."""
    reports = []
    cells = _cells(plan, grid, views)
    entering = len(cells)
    for stage in plan.stages:
        # A stage that merges every patch lists none; leading tokens stay all the same.
        each = plan.num_visual_tokens // plan.views
        every = [i for i in range(each * plan.views) if i % each < plan.leading] if stage.layer is None else []
        index = [int(i) for i in kept.get(stage.where, np.array(every))]
        cells = [cells[i] for i in index] + [None] * stage.recycled
        reports.append(StageReport(stage.where, entering, len(index), stage.recycled, index, cells))
        entering = len(cells)
    return reports


def _cells(plan: PruningPlan, grid: int, views: Views) -> list[tuple[int, ...] | None]:
    """The image cell of every visual token before pruning; see `StageReport.grid`."""
    patches = grid * grid

    def cell(number: int) -> tuple[int, ...]:
        view, patch = divmod(number, patches)
        return divmod(patch, grid) if plan.views == 1 else (view, *divmod(patch, grid))

    if views.rows is None:
        first: list[tuple[int, ...] | None] = [None] * plan.leading
        return [
            place for view in range(plan.views) for place in first + [cell(view * patches + i) for i in range(patches)]
        ]
    sequence = views.rows.sequence[: int(views.rows.length.sum())]
    return [cell(int(token)) if token < plan.views * patches else None for token in sequence]


def _milliseconds(preprocess: float, ranking: float | None, timings: Timings) -> dict[str, float | None]:
    per_token = timings.per_token
    return {
        "preprocess": round(preprocess, 3),
        **({} if ranking is None else {"ranking": round(ranking, 3)}),
        "vision": round(timings.vision, 3),
        "prefill": round(timings.prefill, 3),
        "per_token": None if per_token is None else round(per_token, 3),
    }
