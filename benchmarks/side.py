"""One side of a CPU benchmark, to be run by `apart.Side`.

    python benchmarks/side.py vtexport BUNDLE THREADS
    python benchmarks/side.py transformers CHECKPOINT
    python benchmarks/side.py hooks CHECKPOINT BUNDLE
    python benchmarks/side.py openvino-genai EXPORTED PRECISION THREADS

`hooks` is SparseVLM as research code has it, hooked into transformers, by the bundle's plan. `openvino-genai` is its
VLMPipeline with its defaults, but for the precision (f32, or default) and the number of threads.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from apart import Answer, Task, serve

if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION = "What is shown in this image?"


def vtexport(folder: str, threads: str) -> Callable[[Task], Answer]:
    from dataclasses import replace

    from vtexport import Runner
    from vtexport.runtime.request import Decoding

    runner = Runner.open(folder, int(threads), vision_cache=0)
    size = runner.bundle.spec().vision.image_size
    tiles = runner.bundle.spec().views.tiles or (1, 1)

    def answer(task: Task) -> Answer:
        images = task.images(size * max(tiles))
        start = time.perf_counter()
        requests = [runner.request(image, QUESTION) for image in images]
        preprocess = 1000 * (time.perf_counter() - start)
        padded = [replace(one, prompt=_lengthened(one.prompt, task.text)) for one in requests]
        start = time.perf_counter()
        results, timings = runner.generate(padded, Decoding(task.new_tokens, max_positions=1 << 20))
        total = preprocess + 1000 * (time.perf_counter() - start)
        times = timings[0]
        return {
            "first_token": preprocess + times.vision + times.prefill,
            "per_token": times.per_token,
            "total": total,
            "vision": times.vision,
            "prefill": times.prefill,
            "text": len(padded[0].prompt.token_ids),
            "tokens": results[0].token_ids,
        }

    return answer


def _lengthened(prompt: Any, text: int) -> Any:
    """The prompt with its last text token repeated until it has `text` tokens."""
    from dataclasses import replace

    more = max(0, text - len(prompt.token_ids))
    return replace(prompt, token_ids=prompt.token_ids + prompt.token_ids[-1:] * more)


def transformers(folder: str, bundle: str = "") -> Callable[[Task], Answer]:
    from hooked import HookedSparseVLM, Transformers

    from vtexport import Bundle

    plan = Bundle.open(bundle).manifest.pruning_plans()[0] if bundle else None
    side = Transformers(Path(folder)) if plan is None else HookedSparseVLM(Path(folder), plan)
    return lambda task: side.run(task.images(side.image_size)[0], QUESTION, task.new_tokens)


def openvino_genai(folder: str, precision: str, threads: str) -> Callable[[Task], Answer]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []
            self.tokens: list[int] = []

        def write(self, token: int | list[int]) -> Any:
            self.times.append(time.perf_counter())
            self.tokens += token if isinstance(token, list) else [token]
            return genai.StreamingStatus.RUNNING

        def end(self) -> None: ...

    chosen = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    pipeline = genai.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=int(threads), **chosen)
    config = genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False

    def answer(task: Task) -> Answer:
        image, clock = np.asarray(task.images(336)[0])[None], Clock()
        config.max_new_tokens = task.new_tokens
        start = time.perf_counter()
        pipeline.generate(QUESTION, images=[ov.Tensor(image)], generation_config=config, streamer=clock)
        total = 1000 * (time.perf_counter() - start)
        return {
            "first_token": 1000 * (clock.times[0] - start),
            "per_token": 1000 * median(np.diff(clock.times)),
            "total": total,
            "tokens": clock.tokens,
        }

    return answer


KINDS: dict[str, Callable[..., Callable[[Task], Answer]]] = {
    "vtexport": vtexport,
    "transformers": transformers,
    "hooks": transformers,
    "openvino-genai": openvino_genai,
}


if __name__ == "__main__":
    serve(KINDS[sys.argv[1]](*sys.argv[2:]))
