"""What choosing tokens for a decoder that runs elsewhere costs micro-llava: exact pruning against chosen embeddings.

    python benchmarks/selection.py [--limit N] [--workers 2] [--json FILE]

Prints a Markdown table of exact match on held-out questions; the last line is one JSON object. *Exact* prunes inside the
decoder. *Select* runs the graph that only chooses (`vtexport.graph.select`), and gives the embeddings of the chosen
tokens to a dense decoder: the one of a fastervlm bundle with as many tokens, which by itself is the third side. FLOPs
are the decoder's prefill for the questions' own length; those of *select* include the choosing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import tables
from accuracy import TEXT_TOKENS, Job, Point, measure
from PIL import Image
from rich.progress import track

from vtexport import BuildOptions, InputError, Runner, build
from vtexport.arrays import Array
from vtexport.cli.console import stderr
from vtexport.measure.evaluate import BATCH, MAX_NEW_TOKENS
from vtexport.micro import heldout, scenes
from vtexport.models import Checkpoint, read_spec, resolve_model
from vtexport.models.resolve import recipe_calibration
from vtexport.models.spec import ModelSpec
from vtexport.pruning import Geometry, PruningPlan, dense_plan, make_plan, selection_plan
from vtexport.pruning.calibration import Calibration
from vtexport.pruning.flops import plan_flops, selection_flops
from vtexport.runtime.generate import generate
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Request
from vtexport.targets.engine import PrefillInput, VisionOutput

METHODS = ("sparsevlm", "fastv")
KEEPS = (0.44, 0.33, 0.25, 0.15)
#: layers to choose after, tried at one keep ratio
LAYERS, LAYERS_KEEP = (0, 1, 2, 3, 4, 6), 0.25
SELECT = "select "


def plan_of(spec: ModelSpec, job: Job) -> PruningPlan:
    """The plan that chooses `job.keep` of the tokens by the method that `job.method` names behind `SELECT`."""
    path = recipe_calibration("micro-llava")
    method, options = job.method.removeprefix(SELECT), dict(job.options)
    calibration = Calibration.load(path) if path is not None and method == "sparsevlm" else None
    given: dict[str, Any] = {"options": options, "calibration": calibration}
    try:
        plan = make_plan(method, Geometry.of(spec), keep=job.keep, **given)
    except InputError:
        # Out of reach where the layers before the first stage count, which they do not for the decoder elsewhere.
        plan = replace(make_plan(method, Geometry.of(spec), keep=1.0, **given), keep=job.keep)
    return selection_plan(plan)


class Selector:
    """The graph that chooses by `plan`, compiled into `folder`, on ONNX Runtime."""

    def __init__(self, spec: ModelSpec, plan: PruningPlan, folder: Path) -> None:
        from vtexport.graph.export import trace_select
        from vtexport.graph.weights import Weights
        from vtexport.models.rope import rope_tables
        from vtexport.targets.onnxruntime.lowering import LowerToContrib

        model = trace_select(spec, plan, "fp32").model
        cos, sin = rope_tables(spec)
        weights = Weights(
            [model], Checkpoint.open(resolve_model("micro-llava")), {"rope.cos": cos.numpy(), "rope.sin": sin.numpy()}
        )
        weights.write(folder, lambda _bytes: None)
        LowerToContrib()(model)
        ir.save(model, folder / "select.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(folder / "select.onnx", options, providers=["CPUExecutionProvider"])

    def __call__(self, requests: Sequence[Request], visual: Array) -> VisionOutput:
        """What a vision graph would have given, had it known which of the tokens `visual` [B, V, C] to keep."""
        length = np.array([len(request.prompt.token_ids) for request in requests])
        input_ids = np.zeros((len(requests), length.max()), dtype=np.int64)
        for row, request in zip(input_ids, requests, strict=True):
            row[: len(request.prompt.token_ids)] = request.prompt.token_ids
        at = np.array([request.prompt.image_positions[0] for request in requests])
        chosen, kept = self.session.run(["chosen", "kept"], PrefillInput(input_ids, at, length, visual).feeds())
        return VisionOutput({"visual": chosen, "kept": kept})


def measure_selection(job: Job, limit: int) -> Point:
    """Ask a dense decoder about the tokens that were chosen for it, with one thread."""
    import torch

    torch.set_num_threads(1)
    spec = read_spec(resolve_model("micro-llava"))
    plan = plan_of(spec, job)
    with tempfile.TemporaryDirectory() as scratch:
        bundles = [
            build(BuildOptions("micro-llava", keep, method, dtype="fp32", self_check=False), Path(scratch) / method)
            for keep, method in ((1.0, "dense"), (job.keep, "fastervlm"))
        ]
        seeing, answering = (Runner(bundle, threads=1) for bundle in bundles)
        (folder := Path(scratch) / "select").mkdir()
        select = Selector(spec, plan, folder)
        by_kind: dict[str, list[bool]] = {kind: [] for kind in scenes.KINDS}
        examples = list(heldout.examples(limit))
        for batch in (examples[start : start + BATCH] for start in range(0, limit, BATCH)):
            requests = [seeing.request(Image.fromarray(one.image), one.question.text) for one in batch]
            visual = look(seeing.engine, seeing.plan, requests).seen().visual
            vision, decoding = select(requests, visual), answering.decoding(MAX_NEW_TOKENS)
            results, _ = generate(answering.engine, answering.plan, requests, decoding, vision=vision)
            for one, result in zip(batch, results, strict=True):
                by_kind[one.question.kind].append(answering.prompter.decode(result.token_ids) == one.question.answer)
    right = [found for kind in by_kind.values() for found in kind]
    cost = selection_flops(spec, plan, TEXT_TOKENS) + plan_flops(spec, answering.plan, TEXT_TOKENS).prefill
    share = cost / plan_flops(spec, dense_plan(plan), TEXT_TOKENS).prefill
    kinds = {kind: sum(found) / len(found) for kind, found in by_kind.items() if found}
    return Point(sum(right) / len(right), answering.plan.mean_visual_tokens, share, kinds)


def measured(job: Job, limit: int) -> Point | None:
    """Either kind of job; None if the keep ratio is out of the method's reach."""
    return measure_selection(job, limit) if job.method.startswith(SELECT) else measure(job, limit)


def jobs() -> list[Job]:
    todo = [Job("dense", 1.0)]
    for keep in KEEPS:
        todo += [Job(side + method, keep) for method in METHODS for side in ("", SELECT)]
        todo.append(Job("fastervlm", keep))
    for layer in LAYERS:
        todo += [Job(SELECT + method, LAYERS_KEEP, (("layers", str(layer)),)) for method in METHODS]
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=heldout.NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    todo = jobs()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(measured, todo, [arguments.limit] * len(todo))
        points = dict(zip(todo, track(results, "build and ask", total=len(todo), console=stderr), strict=True))
    every = [{**asdict(job), **(asdict(point) if point else {})} for job, point in points.items()]
    result = {"questions": arguments.limit, "points": every}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    recorded = {"selection": {"result": result}}
    print(tables.selection(recorded))
    print(tables.selection_layers(recorded))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
