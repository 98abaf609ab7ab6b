"""Pairs of image and prompt on the dense model and under plans, in batches: every shared layer runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from vtexport.arrays import Array
from vtexport.errors import ModelError
from vtexport.models.prompt import Prompt
from vtexport.models.spec import ModelSpec
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.pruning.calibration import RANK_TOLERANCE
from vtexport.pruning.decoder import DecoderState, counts_after, drop

if TYPE_CHECKING:
    from vtexport.check.batched import BatchedModel, Embedded, LayerAttention

Result = TypeVar("Result")

#: tokens of the dense model's greedy answer that must come out the same
ANSWER_TOKENS = 8
# What a batch may take beside the weights, and its most pairs. Both are part of the result's last digits: sums are
# rounded differently in batches of other sizes. That is why they do not depend on the machine.
_BYTES = 256 << 20
_PAIRS = 16


def batch_size(spec: ModelSpec, text: int) -> int:
    """How many pairs run at once on a model, for prompts of at most `text` tokens; at least one."""
    d, v = spec.decoder, spec.vision
    places = spec.num_visual_tokens + text + ANSWER_TOKENS
    layer = 3 * d.num_heads * places**2 + places * (3 * d.intermediate_size + 8 * d.hidden_size)
    cache = 2 * d.num_layers * places * d.num_kv_heads * d.head_size
    tower = 3 * v.num_heads * v.num_patches**2 + v.num_patches * (3 * v.intermediate_size + 8 * v.hidden_size)
    each = 4 * (max(layer, spec.views.total * tower) + cache)
    return max(1, min(_PAIRS, _BYTES // each))


@dataclass(frozen=True)
class Measured:
    """One pair on the dense model.

    Attributes:
        token: the greedy next token.
        ranks: by layer, the numerical rank of the raters x visual attention.
        mass: by layer, the share of a rater's attention that falls on visual tokens.
        changed: by layer, whether dropping every visual token after it changes the next token.
        spread: of CLS's attention, in patches; None where it was not asked for.
        answer: the greedy answer, up to its end token or `ANSWER_TOKENS` tokens; none where it was not asked for.
    """

    token: int
    ranks: list[int]
    mass: list[float]
    changed: list[bool]
    spread: float | None
    answer: list[int]


class Batch:
    """Some pairs, whose images the vision tower has seen.

    Args:
        model: the model.
        dense: its dense plan.
        prompts: the pairs' prompts.
        views: the pairs' images.
    """

    def __init__(
        self, model: BatchedModel, dense: PruningPlan, prompts: Sequence[Prompt], views: Sequence[Views]
    ) -> None:
        self._model, self._dense, self._prompts = model, dense, prompts
        self._layers = range(model.spec.decoder.num_layers)
        self._looked = model.look(views, dense)

    def measure(self, exits: Mapping[int, PruningPlan], *, answers: bool) -> list[Measured]:
        """Run the dense model once, and behind each layer of `exits` the text alone, by that layer's plan.

        Args:
            exits: for layers but the last, the plan under which every visual token leaves after it.
            answers: whether to go on to greedy answers, and to measure the spread of CLS's attention.

        Raises:
            ModelError: a layer gives NaN or infinity.
        """
        import torch
        from transformers import DynamicCache

        from vtexport.pruning.raters import text_raters

        model, pairs = self._model, range(len(self._prompts))
        with torch.inference_mode():
            embedded, lengths = self._embedded(self._dense, [()] * len(pairs))
            rows, layout = embedded.rows, embedded.rows.layout
            raters = text_raters(embedded.image, embedded.text, layout.after_image(), layout.present())
            cache = DynamicCache() if answers else None
            left: DecoderState | None = None
            ranks: list[list[int]] = [[] for _ in pairs]
            mass: list[list[float]] = [[] for _ in pairs]
            for number in self._layers:
                hidden, rotated = model.layer(number, rows, cache=cache)
                _check(hidden, f"decoder layer {number}")
                for pair, attention in enumerate(self._attention(rows, rotated, raters, lengths)):
                    ranks[pair].append(_rank(attention))
                    mass[pair].append(float(attention.sum(dim=1).mean()))
                rows = replace(rows, hidden=hidden)
                if left is not None:
                    left = self._onwards(number, left)
                if number in exits:
                    left = _joined(
                        left, drop(exits[number], counts_after(exits[number], number), rows, _unrated).sequence
                    )
            tokens = _check(model.logits(rows), "the head").argmax(dim=2)
            changed = torch.zeros(0, len(pairs), dtype=torch.bool)
            if left is not None:
                others = _check(model.logits(left), "the head").argmax(dim=2)
                changed = others.view(len(exits), len(pairs)) != tokens[:, 0]
            found = self._answers(rows, cache, tokens) if answers else [[] for _ in pairs]
            spread = self._looked.spread() if answers else [None for _ in pairs]
        return [
            Measured(int(tokens[i, 0]), ranks[i], mass[i], [*changed[:, i].tolist(), False], spread[i], found[i])
            for i in pairs
        ]

    def logits(
        self, plans: Sequence[PruningPlan], new_tokens: Sequence[Sequence[int]], read: Callable[[Array], Result]
    ) -> Iterator[tuple[int, Result]]:
        """For each of `plans`, in any order, its number and what `read` makes of the logits under it.

        Plans of one vision stage share the layers up to the first decoder stage of each, and its scores.

        Args:
            plans: the plans.
            new_tokens: for each pair, tokens after its prompt.
            read: takes logits [B, 1 + n, vocabulary], after the prompt and each new token, of which a pair has at
                most n.

        Raises:
            ModelError: a layer gives NaN or infinity.
        """
        import torch

        groups: dict[Any, dict[int, PruningPlan]] = {}
        for number, plan in enumerate(plans):
            groups.setdefault((plan.methods.vision, plan.vision_stage), {})[number] = plan
        # Only the tower's state and one group's rows are held; logits are read at once.
        for group in groups.values():
            with torch.inference_mode():
                yield from ((number, read(logits.numpy())) for number, logits in self._group(group, new_tokens))

    def _group(self, waiting: dict[int, PruningPlan], new_tokens: Sequence[Sequence[int]]) -> Iterator[tuple[int, Any]]:
        """`logits` of plans that have one vision stage."""
        model, (embedded, _) = self._model, self._embedded(next(iter(waiting.values())), new_tokens)
        rows, new = embedded.rows, max(map(len, new_tokens))
        for number in self._layers:
            hidden, attention = model.layer(number, rows)
            rows = replace(rows, hidden=hidden)
            scores: dict[Any, Any] = {}
            for place in [place for place, plan in waiting.items() if min(plan.decoder_stages, default=-1) == number]:
                plan = waiting.pop(place)
                raters = model.raters(plan, embedded)
                rate = partial(model.score, plan.methods.decoder, number, rows, raters, attention, {})
                pruned = drop(plan, counts_after(plan, number), rows, partial(_shared, scores, plan, rate)).sequence
                yield place, self._onwards_under(plan, number + 1, pruned, raters, new)
            if not waiting:
                return
        logits = _check(model.logits(rows, new), "the head")
        yield from ((place, logits) for place in waiting)

    def _onwards_under(self, plan: PruningPlan, first: int, rows: DecoderState, raters: Any, new: int) -> Any:
        """The logits [B, 1 + new, vocabulary] of `plan`, from the input `rows` of layer `first` on."""
        model, stages = self._model, plan.decoder_stages
        for number in self._layers[first:]:
            hidden, attention = model.layer(number, rows)
            rows = replace(rows, hidden=hidden)
            if number in stages:
                rate = partial(model.score, plan.methods.decoder, number, rows, raters, attention, {})
                rows = drop(plan, counts_after(plan, number), rows, rate).sequence
        return _check(model.logits(rows, new), f"the decoder under {plan.method}")

    def _embedded(
        self, plan: PruningPlan, new_tokens: Sequence[Sequence[int]]
    ) -> tuple[Embedded, tuple[tuple[int, ...], ...]]:
        """The decoder's input under the vision stage of `plan`, and each pair's visual tokens by image."""
        seen = self._model.see(self._looked, plan)
        visual = _check(seen.pruned.tokens, "the vision tower or the projector")
        return self._model.embed(self._prompts, visual, new_tokens, seen.length), seen.length

    def _attention(
        self, rows: DecoderState, rotated: LayerAttention, raters: Any, lengths: Sequence[tuple[int, ...]]
    ) -> Iterator[Any]:
        """For each pair, the head-mean attention [R, V] of its raters to its visual tokens."""
        from vtexport.pruning.plain import attention_rows

        size, places = self._model.spec.decoder.head_size, rows.layout.text_places()
        query = rows.layout.rows_of(rotated.query, places).unflatten(2, (-1, size)).transpose(1, 2)
        key = rotated.key.unflatten(2, (-1, size)).transpose(1, 2)
        attention = attention_rows(query, key, places, size**-0.5).mean(dim=1)
        visual = rows.layout.visual_of(attention.transpose(1, 2))
        for pair, length in enumerate(lengths):
            yield visual[pair, : sum(length)].T[raters[pair]]

    def _onwards(self, number: int, left: DecoderState) -> DecoderState:
        """Rows of text alone behind layer `number`, a batch of pairs at a time, as memory is meant for."""
        import torch

        step, out = len(self._prompts), []
        for first in range(0, left.hidden.shape[0], step):
            part = replace(
                left, hidden=left.hidden[first : first + step], positions=left.positions[first : first + step]
            )
            out.append(self._model.layer(number, part)[0])
        return replace(left, hidden=torch.cat(out))

    def _answers(self, rows: DecoderState, cache: Any, tokens: Any) -> list[list[int]]:
        """The greedy answers that begin with `tokens` [B, 1], behind a prompt whose keys and values `cache` holds."""
        import torch

        model, ends = self._model, self._model.spec.eos_token_ids
        answers = [[int(token)] for token in tokens[:, 0]]
        last = rows.layout.last_place()[:, None]
        # Behind the padding of a short prompt, new tokens see the prompt and each other.
        seen = torch.arange(rows.hidden.shape[1]) <= last
        for step in range(1, ANSWER_TOKENS):
            going = [answer for answer in answers if answer[-1] not in ends]
            if not going:
                break
            seen = torch.cat([seen, torch.ones_like(last, dtype=torch.bool)], dim=1)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]
            state = DecoderState(model.embeddings(tokens), last + step, rows.layout)
            for number in self._layers:
                state = replace(state, hidden=model.layer(number, state, mask, cache)[0])
            tokens = _check(model.head(state.hidden), "the head").argmax(dim=2)
            for answer, token in zip(answers, tokens[:, 0], strict=True):
                if answer[-1] not in ends:
                    answer.append(int(token))
        return answers


def _shared(scores: dict[Any, Any], plan: PruningPlan, rate: Callable[[], Any]) -> Any:
    """The scores at a stage that is the first of several plans; they do not depend on later stages."""
    method = plan.methods.decoder
    assert method is not None, "a plan with decoder stages has a decoder-stage method"
    kind = replace(method, layers="")
    if kind not in scores:
        scores[kind] = rate()
    return scores[kind]


def _unrated() -> Any:
    raise AssertionError("where every visual token leaves, none is rated")


def _joined(first: DecoderState | None, then: DecoderState) -> DecoderState:
    """The rows of both, which have equal lengths."""
    if first is None:
        return then
    import torch

    layouts = first.layout, then.layout
    position, length = (torch.cat([getattr(x, name) for x in layouts]) for name in ("image_position", "text_length"))
    counts = [layout.counts for layout in layouts if layout.counts is not None]
    layout = replace(
        then.layout, image_position=position, text_length=length, counts=torch.cat(counts) if counts else None
    )
    return DecoderState(torch.cat([first.hidden, then.hidden]), torch.cat([first.positions, then.positions]), layout)


def _rank(attention: Any) -> int:
    """The numerical rank of the attention [R, V]."""
    import torch

    values = torch.linalg.svdvals(attention)
    return int((values >= RANK_TOLERANCE * values[0]).sum())


def _check(values: Any, where: str) -> Any:
    """`values`, if all are finite.

    Raises:
        ModelError: one is NaN or infinite.
    """
    import torch

    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{where} gives NaN or infinity in fp32, so nothing can be measured; get the checkpoint again")
    return values
