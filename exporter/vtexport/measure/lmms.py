"""A bundle as a model of lmms-eval, which finds it by the entry point in pyproject.toml.

    python -m lmms_eval --model vtexport --model_args bundle=DIR --tasks pope

Only lmms-eval imports this module; vtexport does without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from vtexport.errors import InputError
from vtexport.runtime.answer import Answer
from vtexport.runtime.runner import MAX_NEW_TOKENS, Runner

_GREEDY = {"temperature": (0, None), "do_sample": (False, None), "num_beams": (1, None)}


def manifest() -> ModelManifest:
    """What lmms-eval's registry knows the model by."""
    return ModelManifest(model_id="vtexport", chat_class_path=f"{__name__}.{VtexportModel.__name__}")


class VtexportModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A bundle that answers lmms-eval's requests.

    Args:
        bundle: the bundle's folder.
        batch_size: prompts per batch.
        threads: threads of the runtime; 0 leaves the number to it.
        ranking_from: a bundle that ranks visual tokens, for method sgl.
        others: none; lmms-eval passes whatever stands in its command line.

    Raises:
        VtexportError: the bundle cannot be opened or cannot answer, or an argument has no effect.
    """

    is_simple = False

    def __init__(
        self,
        bundle: str = "",
        batch_size: int | str = 1,
        threads: int = 0,
        ranking_from: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if not bundle:
            raise InputError("no bundle is given; write --model_args bundle=DIR")
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} has no effect on a bundle; leave it out (known: bundle, threads, ranking_from)")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size {batch_size} is no number of prompts; give 1 or more")
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
        for batch in _batches(requests, self._batch):
            options = batch[0].args[1]
            _check_greedy(options)
            pairs = [self._pair(request) for request in batch]
            answered = self.runner.ask(pairs, int(options.get("max_new_tokens") or MAX_NEW_TOKENS))
            answers += answered
            texts += [_cut(answer.text, options.get("until")) for answer in answered]
        _log(answers, self._batch)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there: an engine decodes greedily and gives no likelihoods.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"task {requests[0].task_name} scores likelihoods, which a bundle does not give; choose a task that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: these tasks make each prompt out of the answer before.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"task {requests[0].task_name} asks in several rounds, which this model class does not; choose another task"
        )

    def _pair(self, request: Instance) -> tuple[Any, Any]:
        """The pictures and the messages of a request, as `Runner.ask` takes them."""
        to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise InputError(f"task {task} has {'videos' if videos else 'sound'}; a bundle takes images here")
        pictures = [image.convert("RGB") for image in images]
        if len(pictures) != self.runner.prompter.images:
            raise InputError(
                f"task {task}, document {number}: it has {len(pictures)} images, but the bundle takes "
                f"{self.runner.prompter.images} per prompt"
            )
        turns = [message.model_dump(include={"role", "content"}) for message in messages.messages]
        return pictures[0] if len(pictures) == 1 else pictures, turns


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Up to `size` requests at a time, in their order, whose options are the same."""
    batch: list[Instance] = []
    for request in requests:
        if batch and (len(batch) == size or request.args[1] != batch[0].args[1]):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _check_greedy(options: Mapping[str, Any]) -> None:
    for name, plain in _GREEDY.items():
        if options.get(name) not in plain:
            raise InputError(f"the task wants {name}={options[name]}, but bundles decode greedily; give --gen_kwargs {name}={plain[0]}")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """`text` up to the first of the stop texts."""
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def _log(answers: Sequence[Answer], batch: int) -> None:
    """Report speed where lmms-eval reports that of its other models."""
