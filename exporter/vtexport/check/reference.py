"""The reference that engines are compared with: the model as transformers runs it, pruned by a plan's methods.

Nothing of `vtexport.graph` is used here, so that an error there cannot hide in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vtexport.arrays import Array
from vtexport.check.batched import BatchedModel
from vtexport.models.prompt import Prompt
from vtexport.models.views import Views
from vtexport.pruning import PruningPlan
from vtexport.pruning.decoder import counts_after, drop


@dataclass(frozen=True)
class ReferenceVision:
    """The output of the vision stage.

    Attributes:
        visual: [1, K, C], padded; `length` counts the visual tokens.
        kept: [1, K'] int32 or None.
        score: [1, V] or None.
        length: visual tokens of each image.
        spread: of CLS's attention, in patches; None with several views or without CLS.
    """

    visual: Any
    kept: Array | None
    score: Array | None
    length: tuple[int, ...]
    spread: float | None


@dataclass(frozen=True)
class ReferenceAnswer:
    """The output of the decoder.

    Attributes:
        logits: [1 + new tokens, vocabulary] after the prompt and after each further token.
        kept: by stage, indices [K'] int32 into its input.
        score: by stage, scores [V].
    """

    logits: Array
    kept: dict[str, Array] = field(default_factory=dict)
    score: dict[str, Array] = field(default_factory=dict)


class ReferenceModel(BatchedModel):
    """The whole model, one prompt at a time."""

    def vision(self, views: Views, plan: PruningPlan, extras: Mapping[str, Array] | None = None) -> ReferenceVision:
        """Run the vision tower and the projector of transformers, with the plan's method in between.

        Args:
            views: a prompt's images.
            plan: the plan.
            extras: the method's inputs besides images (`vtexport.pruning.extra`), by name.
        """
        looked = self.look([views], plan, extras)
        seen = self.see(looked, plan)
        pruned, length = seen.pruned, seen.length[0]
        spread = looked.spread()[0] if plan.views == 1 and self.spec.vision.class_token else None
        kept = None if pruned.index is None else pruned.index.numpy()[:, : sum(length)]
        score = None if pruned.score is None else pruned.score.numpy()
        return ReferenceVision(pruned.tokens, kept, score, length, spread)

    def answer(
        self,
        prompt: Prompt,
        visual: Any,
        new_tokens: Sequence[int],
        plan: PruningPlan,
        forced: Mapping[str, Array] | None = None,
        extras: Mapping[str, Array] | None = None,
        length: tuple[int, ...] | None = None,
    ) -> ReferenceAnswer:
        """Run the decoder once on a prompt, its images as `visual`, and `new_tokens` after it.

        The result equals decoding token by token: attention is causal, and pruning looks at nothing after the prompt.

        Args:
            prompt: the prompt.
            visual: [1, K, C], projected visual tokens.
            new_tokens: tokens after the prompt.
            plan: the plan whose decoder stages prune.
            forced: by stage, indices to keep instead of those of highest score.
            extras: the method's inputs besides the prompt (`vtexport.pruning.extra`), by name.
            length: visual tokens of each image; None for a single image with all K.
        """
        import torch

        method = plan.methods.decoder
        with torch.inference_mode():
            embedded = self.embed([prompt], visual, [new_tokens], None if length is None else [length])
            rows, raters = embedded.rows, self.raters(plan, embedded)
            kept: dict[str, Array] = {}
            score: dict[str, Array] = {}
            for number in range(self.spec.decoder.num_layers):
                hidden, attention = self.layer(number, rows)
                rows = replace(rows, hidden=hidden)
                stage = plan.decoder_stages.get(number)
                if stage is None:
                    continue
                given = None if forced is None or stage.where not in forced else torch.from_numpy(forced[stage.where])
                rate = partial(self.score, method, number, rows, raters, attention, extras or {})
                dropped = drop(plan, counts_after(plan, number), rows, rate, None if given is None else given[None])
                rows = dropped.sequence
                if dropped.index is not None and dropped.score is not None:
                    index = dropped.index[0].numpy()
                    kept[stage.where], score[stage.where] = index[index >= 0], dropped.score[0].numpy()
            logits = self.logits(rows, len(new_tokens))[0].numpy()
        return ReferenceAnswer(logits, kept, score)
