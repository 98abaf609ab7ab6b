"""Latency on the CPU: vtexport dense against transformers, and vtexport pruned against dense, in one run.

    python benchmarks/cpu.py [--model half-billion | micro-llava] [--keep 0.25] [--runs 7] [--json FILE]

Every side is warmed up, then all take turns; medians and their ratios are reported. The time to the first token
counts preprocessing, vision tower, pruning and prefill. What pruning itself costs is measured on the two ops alone,
TokenScore and TokenSelect, at the model's sizes: inside the vision engine it drowns in the tower's own variation.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from models import half_billion_llava

from vtexport.build import BuildOptions, build
from vtexport.generate import generate
from vtexport.graph.functions import OPSET, attach_functions
from vtexport.models import ModelSpec, read_spec, resolve_model
from vtexport.profile import QUESTION, device_name, sample_photo
from vtexport.pruning import PruningPlan
from vtexport.pruning.flops import plan_flops
from vtexport.pruning.onnx_node import PRUNING
from vtexport.runtime import Runner

Times = dict[str, float]


class Vtexport:
    """A bundle, measured through the runtime that users have."""

    def __init__(self, folder: Path) -> None:
        self.runner = Runner.open(folder)
        self.photo = sample_photo()

    def run(self, new_tokens: int) -> Times:
        start = time.perf_counter()
        request = self.runner.request(self.photo, QUESTION)
        preprocess = 1000 * (time.perf_counter() - start)
        _, timings = generate(
            self.runner.engine, self.runner.plan, [request], new_tokens, eos_token_ids=(), max_positions=2048
        )
        step = timings.per_token
        assert step is not None
        return {
            "vision": timings.vision,
            "prefill": timings.prefill,
            "first_token": preprocess + timings.vision + timings.prefill,
            "per_token": step,
        }


class Transformers:
    """transformers in fp32 with sdpa: its own processor, its own cache, greedy."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.torch: Any = torch
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.photo = sample_photo()

    def run(self, new_tokens: int) -> Times:
        steps = []
        with self.torch.inference_mode():
            start = time.perf_counter()
            content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self.processor(images=self.photo, text=text, return_tensors="pt")
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = 1000 * (time.perf_counter() - start)
            for _ in range(new_tokens - 1):
                began = time.perf_counter()
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                steps.append(1000 * (time.perf_counter() - began))
        return {"first_token": first, "per_token": median(steps)}


def in_turns(sides: dict[str, Callable[[], Times]], runs: int, warm_up: int = 2) -> dict[str, Times]:
    """Medians of every side's times, the sides taking turns, each first as often as last."""
    found: dict[str, list[Times]] = {name: [] for name in sides}
    for number in range(warm_up + runs):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            times = sides[name]()
            if number >= warm_up:
                found[name].append(times)
    return {name: {stage: median(t[stage] for t in times) for stage in times[0]} for name, times in found.items()}


def pruning_session(spec: ModelSpec, plan: PruningPlan) -> Callable[[], Times]:
    """TokenScore and TokenSelect as the vision engine has them, on random states."""
    v = spec.vision
    rng = np.random.default_rng(0)
    feeds = {
        "query": rng.standard_normal((1, v.num_heads, 1, v.head_size), dtype=np.float32),
        "key": rng.standard_normal((1, v.num_heads, 1 + v.num_patches, v.head_size), dtype=np.float32),
        "hidden": rng.standard_normal((1, v.num_patches, v.hidden_size), dtype=np.float32),
    }
    inputs = {
        name: ir.Value(name=name, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, a in feeds.items()
    }
    score = ir.node(
        "TokenScore",
        [inputs["query"], inputs["key"]],
        {"start": 1, "count": v.num_patches, "scale": v.head_size**-0.5},
        domain=PRUNING,
    )
    select = ir.node(
        "TokenSelect",
        [inputs["hidden"], score.outputs[0]],
        {"keep": plan.patch_budget},
        domain=PRUNING,
        num_outputs=2,
    )
    for value, name in zip(select.outputs, ("kept", "index"), strict=True):
        value.name = name
    graph = ir.Graph(list(inputs.values()), select.outputs, nodes=[score, select], opset_imports={"": OPSET}, name="p")
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])

    def run() -> Times:
        began = time.perf_counter()
        session.run(None, feeds)
        return {"vision": 1000 * (time.perf_counter() - began)}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        half = arguments.model == "half-billion"
        folder = half_billion_llava(work / "model") if half else resolve_model(arguments.model)
        spec = read_spec(folder)
        bundles = {}
        for method, keep in (("dense", 1.0), ("fastervlm", arguments.keep)):
            print(f"build {method}, keep {keep:g}", flush=True)
            options = BuildOptions(str(folder), keep, method)
            bundles[method] = build(options, work / method)
        dense, pruned = Vtexport(bundles["dense"].folder), Vtexport(bundles["fastervlm"].folder)
        transformers = Transformers(folder)
        new = arguments.new_tokens
        print("measure", flush=True)
        times = in_turns(
            {
                "transformers dense": lambda: transformers.run(new),
                "vtexport dense": lambda: dense.run(new),
                f"vtexport fastervlm {arguments.keep:g}": lambda: pruned.run(new),
            },
            arguments.runs,
        )
        score_and_select = pruning_session(spec, bundles["fastervlm"].manifest.plan.plan())
        cost = in_turns({"pruning": score_and_select}, 10 * arguments.runs)["pruning"]["vision"]
        text = len(pruned.runner.prompter.prompt(QUESTION).token_ids)
        flops = {name: plan_flops(spec, bundle.manifest.plan.plan(), text) for name, bundle in bundles.items()}
    other, full, less = times.values()
    predicted = flops["dense"].prefill / flops["fastervlm"].prefill
    gain = full["prefill"] / less["prefill"]
    result = {
        "device": device_name(),
        "model": arguments.model,
        "parameters": spec.num_parameters(),
        "keep": arguments.keep,
        "text_tokens": text,
        "runs": arguments.runs,
        "times_ms": times,
        "first_token_against_transformers": other["first_token"] / full["first_token"],
        "per_token_against_transformers": other["per_token"] / full["per_token"],
        "prefill_gain": gain,
        "prefill_gain_by_flops": predicted,
        "prefill_gain_share_of_flops": (gain - 1) / (predicted - 1),
        "first_token_gain": full["first_token"] / less["first_token"],
        "first_token_gain_by_flops": flops["dense"].first_token / flops["fastervlm"].first_token,
        "pruning_ms": cost,
        "pruning_share_of_vision": cost / less["vision"],
    }
    print(f"\n{'median ms':28}" + "".join(f"{stage:>14}" for stage in less))
    for name, row in times.items():
        print(f"{name:28}" + "".join(f"{row[s]:14.2f}" if s in row else f"{'':14}" for s in less))
    print(
        f"\ndense against transformers: first token {result['first_token_against_transformers']:.2f}x, "
        f"per token {result['per_token_against_transformers']:.2f}x"
        f"\nkeep {arguments.keep:g} against dense: prefill {gain:.2f}x ({predicted:.2f}x by FLOPs), first token "
        f"{result['first_token_gain']:.2f}x ({result['first_token_gain_by_flops']:.2f}x by FLOPs)"
        f"\npruning itself: {result['pruning_ms']:.2f} ms, {result['pruning_share_of_vision']:.1%} of vision"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
