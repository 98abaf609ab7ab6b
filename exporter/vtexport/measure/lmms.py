"""A bundle as a model of lmms-eval, which finds it by the entry point in pyproject.toml.

    python -m lmms_eval --model vtexport --model_args bundle=DIR --tasks pope

Only lmms-eval imports this module; vtexport does without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from vtexport.errors import InputError
from vtexport.measure.evaluate import first_token
from vtexport.models.pictures import open_image
from vtexport.runtime.answer import Answer
from vtexport.runtime.runner import MAX_NEW_TOKENS, Runner

#: options of a task by which it would not decode greedily, and their value if it does
_GREEDY = {"temperature": 0, "do_sample": False, "num_beams": 1}


def manifest() -> ModelManifest:
    """What lmms-eval's registry knows the model by."""
    return ModelManifest(model_id="vtexport", chat_class_path=f"{__name__}.{BundleModel.__name__}")


class BundleModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A bundle that answers lmms-eval's requests.

    Args:
        bundle: the bundle's folder.
        batch_size: prompts per batch.
        threads: threads of the runtime; 0 leaves the number to it.
        ranking_from: a bundle that ranks visual tokens, for method sgl.
        others: whatever else stands in lmms-eval's command line.

    Raises:
        VtexportError: the bundle cannot be opened or cannot answer, or an argument has no effect.
    """

    is_simple = False

    def __init__(
        self,
        bundle: str = "",
        batch_size: int | str = 1,
        threads: int | str = 0,
        ranking_from: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if not bundle:
            raise InputError("no bundle is given; write --model_args bundle=DIR")
        for name, value in others.items():
            if value is not None:
                raise InputError(f"{name} has no effect on a bundle; leave it out, or give threads or ranking_from")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size {batch_size} is no number of prompts; give 1 or more")
        if not str(threads).isdecimal():
            raise InputError(f"threads={threads} is no number of threads; give 0 or more")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("a bundle answers in one process; start lmms-eval without accelerate or torchrun")
        self._batch = int(batch_size)
        # Nothing is kept of an image, so that times are those of new images.
        self.runner = Runner.open(bundle, int(threads), ranking_from, vision_cache=0)
        self.runner.need_language_model()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each request, cut at the first of its stop texts.

        Raises:
            InputError: a task that wants sampling or beams, or a request that the bundle cannot take.
        """
        texts: list[str] = []
        answers: list[Answer] = []
        spent = 0.0
        for batch in _batches(requests, self._batch):
            options = _options(batch[0])
            _check_greedy(options, batch[0].task_name)
            pairs = [self._pair(request) for request in batch]
            start = time.perf_counter()
            answered = self.runner.ask(pairs, int(options.get("max_new_tokens") or MAX_NEW_TOKENS))
            spent += time.perf_counter() - start
            answers += answered
            texts += [_cut(answer.text, options.get("until")) for answer in answered]
        _report(answers, spent)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there: an engine decodes greedily and gives no likelihoods.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"task {requests[0].task_name} scores likelihoods, and a bundle, which decodes greedily, gives none; choose a "
            "task that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: in these tasks, prompts depend on the answers before.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"task {requests[0].task_name} asks in rounds, which a bundle is not asked in; choose another task"
        )

    def _pair(self, request: Instance) -> tuple[Any, Any]:
        """The pictures and the messages of a request, as `Runner.ask` takes them."""
        _, to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        images, videos, audios = messages.extract_media()
        where = f"task {task}, document {number}"
        if videos or audios:
            raise InputError(f"{where} has a video or sound, and a bundle is asked about images; choose another task")
        if len(images) != self.runner.prompter.images:
            raise InputError(
                f"{where} has {len(images)} images, but the bundle takes {self.runner.prompter.images} per prompt; choose "
                "another task, or build with another --images"
            )
        # A task gives images, or their paths.
        pictures = [open_image(Path(image)) if isinstance(image, str) else image.convert("RGB") for image in images]
        # What stands in an image's place is its mark alone; the images come beside the messages.
        turns = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if part.type == "text" else {"type": part.type}
                    for part in message.content
                ],
            }
            for message in messages.messages
        ]
        return pictures[0] if len(pictures) == 1 else pictures, turns


def _options(request: Instance) -> Mapping[str, Any]:
    """How its task wants answers generated.

    Raises:
        InputError: a task in the form for models that take no messages.
    """
    options = request.args[2]
    if not isinstance(options, Mapping):
        raise InputError(
            f"task {request.task_name} comes without messages, as lmms-eval reads it from a path; give its name as --tasks, and "
            "its folder as --include_path"
        )
    return options


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Up to `size` requests at a time, in their order, all with the same options."""
    batch: list[Instance] = []
    for request in requests:
        if batch and (len(batch) == size or _options(request) != _options(batch[0])):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _check_greedy(options: Mapping[str, Any], task: str) -> None:
    for name, greedy in _GREEDY.items():
        if options.get(name) not in (None, greedy):
            raise InputError(
                f"task {task} has {name}={options[name]}, but a bundle decodes greedily; give --gen_kwargs {name}={greedy}"
            )


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """`text` up to the first of the stop texts."""
    stops = [until] if isinstance(until, str) else until or []
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text).strip()


def _report(answers: Sequence[Answer], spent: float) -> None:
    """Speed, where lmms-eval reports that of its other models; medians in milliseconds, `spent` in seconds."""
    tokens = sum(len(answer.token_ids) for answer in answers)
    steps = [step for answer in answers if (step := answer.timings_ms["per_token"]) is not None]
    log_metrics(
        total_elapsed_time=spent,
        total_gen_tokens=tokens,
        avg_speed=tokens / spent if spent else 0.0,
        additional_metrics={
            "num_requests": len(answers),
            "first_token_ms": median(first_token(answer.timings_ms) for answer in answers),
            **({"per_token_ms": median(steps)} if steps else {}),
            "mean_visual_tokens": sum(answer.visual_tokens["mean"] for answer in answers) / len(answers),
        },
    )
