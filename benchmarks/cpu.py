"""Latency on the CPU: transformers and vtexport, dense and pruned, research-style hooks, alternating in one run.

    python benchmarks/cpu.py [--runs 7] [--new-tokens 8] [--keep 0.25] [--model half-billion|NAME|FOLDER] [--json FILE]

`half-billion` is a LLaVA of 0.45 B random weights, made on the spot without a download. fp32, batch 1. Sides that prune
alike must answer alike, or the script stops. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from models import half_billion_llava
from op_cost import pruning_ms
from sides import HookedSparseVLM, Side, Times, Transformers, Vtexport, check_equal, in_turns

from vtexport import BuildOptions, build
from vtexport.measure.machine import device_name
from vtexport.measure.profile import QUESTION
from vtexport.models import read_spec, resolve_model
from vtexport.pruning.flops import plan_flops

METHODS = ("sparsevlm", "fastervlm")
STAGES = ("vision", "prefill", "first_token", "per_token")


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
        for method, keep in (("dense", 1.0), *((method, arguments.keep) for method in METHODS)):
            print(f"build {method}, keep {keep:g}", flush=True)
            bundles[method] = build(BuildOptions(str(folder), keep, method), work / method)
        plans = {method: bundle.manifest.pruning_plans()[0] for method, bundle in bundles.items()}
        vtexport = {method: Vtexport(bundle.folder) for method, bundle in bundles.items()}
        text = len(vtexport["dense"].runner.prompter.prompt(QUESTION).token_ids)
        sides: dict[str, Side] = {
            "transformers dense": Transformers(folder),
            "transformers sparsevlm hooks": HookedSparseVLM(folder, plans["sparsevlm"]),
            **{f"vtexport {method}": side for method, side in vtexport.items()},
        }
        pairs = [
            (f"transformers {a}", f"vtexport {b}") for a, b in (("dense", "dense"), ("sparsevlm hooks", "sparsevlm"))
        ]
        check_equal(sides, pairs, arguments.new_tokens)
        print("measure", flush=True)
        times = in_turns(sides, arguments.new_tokens, arguments.runs)
        costs = {method: pruning_ms(spec, plans[method], text) for method in METHODS}
        flops = {method: plan_flops(spec, plan, text) for method, plan in plans.items()}
    dense = times["vtexport dense"]
    result: dict[str, Any] = {
        "device": device_name(),
        "model": arguments.model,
        "parameters": spec.num_parameters(),
        "keep": arguments.keep,
        "text_tokens": text,
        "runs": arguments.runs,
        "times_ms": times,
        "dense_against_transformers": _ratios(times["transformers dense"], dense),
        "sparsevlm_against_hooks": _ratios(times["transformers sparsevlm hooks"], times["vtexport sparsevlm"]),
    }
    for method in METHODS:
        pruned = times[f"vtexport {method}"]
        gain = dense["first_token"] / pruned["first_token"]
        by_flops = flops["dense"].first_token / flops[method].first_token
        result[method] = {
            "mean_visual_tokens": plans[method].mean_visual_tokens,
            "prefill_gain": dense["prefill"] / pruned["prefill"],
            "prefill_gain_by_flops": flops["dense"].prefill / flops[method].prefill,
            "first_token_gain": gain,
            "first_token_gain_by_flops": by_flops,
            "first_token_share_of_flops": gain / by_flops,
            "pruning_ms": costs[method],
            "pruning_share": costs[method] / pruned["prefill" if method == "sparsevlm" else "vision"],
        }
    print(f"\n{'median ms':30}" + "".join(f"{stage:>14}" for stage in STAGES))
    for name, row in times.items():
        print(f"{name:30}" + "".join(f"{row[s]:14.2f}" if s in row else f"{'':14}" for s in STAGES))
    print(f"\ndense against transformers: {_said(result['dense_against_transformers'])}")
    print(f"sparsevlm against hooks on transformers: {_said(result['sparsevlm_against_hooks'])}")
    for method in METHODS:
        figures = result[method]
        print(
            f"{method}, keep {arguments.keep:g}: prefill {figures['prefill_gain']:.2f}x "
            f"({figures['prefill_gain_by_flops']:.2f}x by FLOPs), first token {figures['first_token_gain']:.2f}x "
            f"({figures['first_token_gain_by_flops']:.2f}x by FLOPs); pruning itself {figures['pruning_ms']:.2f} ms, "
            f"{figures['pruning_share']:.1%} of {'prefill' if method == 'sparsevlm' else 'vision'}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _ratios(other: Times, ours: Times) -> Times:
    """How many times as fast as the other ours is, by stage."""
    return {stage: other[stage] / ours[stage] for stage in ("first_token", "per_token")}


def _said(ratios: Times) -> str:
    return f"first token {ratios['first_token']:.2f}x, per token {ratios['per_token']:.2f}x"


if __name__ == "__main__":
    main()
