"""Latency and memory on the CPU: OpenVINO GenAI, transformers, research-style hooks, and vtexport on its targets.

    python benchmarks/cpu.py [--optimum optimum-cli] [--runs 5] [--new-tokens 16] [--keep 0.25] [--threads 2]
                             [--groups fp32,bf16,int8,int4,methods] [--model half-billion|FOLDER] [--json FILE]

Sides of equal precision take turns (`apart.py`): each in a process of its own, on the same cores, and every run asks
about an image that no run before had, so that nobody's cache of prefixes answers. batch 1. `half-billion` is a LLaVA of
0.45 B random weights, made on the spot. Sides in fp32 that prune alike must answer alike, or the script stops.

OpenVINO GenAI comes with `pip install openvino-genai`. Its models are exported by optimum-intel, whose command
`--optimum` names; it needs an environment of its own, because it wants an older transformers. Without it these sides
are left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from apart import SIDE, Task, in_turns, report, summary
from models import half_billion_llava
from side import QUESTION

from vtexport import BuildOptions, Runner, build
from vtexport.measure.machine import device_name
from vtexport.models import read_spec
from vtexport.pruning.flops import plan_flops

FIGURES = ("first_token", "fastest_first_token", "slowest_first_token", "per_token", "peak_mib")


@dataclass(frozen=True)
class Lane:
    """A side: who computes, with which method and keep ratio, in which dtype and with which weights."""

    who: str
    method: str = "dense"
    keep: float = 1.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    weights: str = ""

    @property
    def precision(self) -> str:
        """As it is called in tables: `int8` is int8 weights in a model of `dtype`."""
        return self.weights or self.dtype


def groups(keep: float) -> dict[str, list[Lane]]:
    """Sides that are compared with each other."""
    pruned = ("sparsevlm", keep)
    return {
        "fp32": [
            Lane("openvino-genai"),
            Lane("transformers"),
            *(Lane(target, *plan) for target in ("onnxruntime", "openvino") for plan in (("dense", 1.0), pruned)),
        ],
        "bf16": [
            Lane("openvino-genai", dtype="bf16"),
            *(Lane("openvino", *plan, dtype="bf16") for plan in (("dense", 1.0), pruned)),
        ],
        "int8": [
            Lane("openvino-genai", dtype="bf16", weights="int8"),
            *_quantised("int8", pruned),
        ],
        "int4": _quantised("int4", pruned),
        "methods": [
            Lane("hooks", *pruned),
            *(Lane("onnxruntime", *plan) for plan in (("dense", 1.0), pruned, ("fastervlm", keep))),
        ],
    }


def _quantised(weights: str, pruned: tuple[str, float]) -> list[Lane]:
    plans = (("dense", 1.0), pruned)
    return [
        *(Lane("onnxruntime", *plan, weights=weights) for plan in plans),
        *(Lane("openvino", *plan, dtype="bf16", weights=weights) for plan in plans),
    ]


class Bench:
    """The model, and what sides need of it, made when it is first asked for."""

    def __init__(self, model: Path, work: Path, optimum: str | None, threads: int) -> None:
        self.model, self._work, self.optimum, self._threads = model, work, optimum, threads

    def command(self, lane: Lane) -> list[str]:
        """What runs a side."""
        threads = str(self._threads)
        if lane.who == "transformers":
            return [SIDE, lane.who, str(self.model)]
        if lane.who == "hooks":
            return [SIDE, lane.who, str(self.model), str(self.bundle(Lane("onnxruntime", lane.method, lane.keep)))]
        if lane.who == "openvino-genai":
            precision = "f32" if lane.precision == "fp32" else "default"
            return [SIDE, lane.who, str(self._exported(lane)), precision, threads]
        return [SIDE, "vtexport", str(self.bundle(lane)), threads]

    def bundle(self, lane: Lane) -> Path:
        """The bundle of a side of vtexport's."""
        folder = self._work / "-".join((lane.who, lane.method, f"{lane.keep:g}", lane.dtype, lane.weights))
        if not folder.exists():
            print(f"build {folder.name}", flush=True)
            # Tests check what bundles answer; the checks of all builds would take longer than the rest.
            options = {"quantize": lane.weights} if lane.weights else {}
            wanted = BuildOptions(
                str(self.model),
                lane.keep,
                lane.method,
                lane.who,
                lane.dtype,
                target_options=options,
                self_check=False,
            )
            build(wanted, folder)
        return folder

    def _exported(self, lane: Lane) -> Path:
        """The model in OpenVINO's form."""
        weights = lane.weights or "fp32"
        folder = self._work / f"genai-{weights}"
        if not folder.exists():
            print(f"export {folder.name}", flush=True)
            command = [str(self.optimum), "export", "openvino", "-m", str(self.model)]
            command += ["--task", "image-text-to-text", "--weight-format", weights, str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        return folder


def measured(bench: Bench, lanes: Sequence[Lane], tasks: Sequence[Task], threads: int, busy: bool) -> list[Any]:
    """A point for each side of a group."""
    commands = {str(number): bench.command(lane) for number, lane in enumerate(lanes)}
    answers = in_turns(commands, tasks, threads, busy=busy)
    tokens: dict[tuple[str, float], dict[str, Any]] = {}
    for lane, answered in zip(lanes, answers.values(), strict=True):
        if lane.precision == "fp32" and lane.who != "openvino-genai":
            tokens.setdefault((lane.method, lane.keep), {})[lane.who] = [answer["tokens"] for answer in answered]
    for plan, by_side in tokens.items():
        if any(found != next(iter(by_side.values())) for found in by_side.values()):
            raise SystemExit(f"sides with {plan} answer differently: speed is compared at equal output only; {by_side}")
    return [
        {**asdict(lane), "precision": lane.precision, **summary(answered)}
        for lane, answered in zip(lanes, answers.values(), strict=True)
    ]


def pruning_ms(runner: Runner, task: Task) -> float:
    """Milliseconds of the nodes that score, select and merge, by ONNX Runtime's profiler."""
    image = task.images(runner.bundle.spec().vision.image_size)[0]

    def ask() -> None:
        runner.ask([(image, QUESTION)], 1)

    layers = runner.engine.layer_times(ask)
    # The nodes of a pruning op's body carry its name.
    return sum(time for times in layers.values() for node, time in times.items() if "_Token" in node)


def gains(bench: Bench, points: Sequence[Any], keep: float, task: Task) -> dict[str, Any]:
    """What pruning saves, measured and by FLOPs, and what it costs itself."""
    spec, found = read_spec(bench.model), {}
    lanes = [Lane("onnxruntime"), *(Lane("onnxruntime", method, keep) for method in ("sparsevlm", "fastervlm"))]
    runners = {lane.method: Runner.open(bench.bundle(lane), vision_cache=0) for lane in lanes}
    text = len(runners["dense"].prompter.prompt(QUESTION).token_ids)
    flops = {method: plan_flops(spec, runner.plan, text) for method, runner in runners.items()}
    times = {point["method"]: point for point in points if point["who"] == "onnxruntime"}
    for method in ("sparsevlm", "fastervlm"):
        cost, stage = pruning_ms(runners[method], task), "prefill" if method == "sparsevlm" else "vision"
        found[method] = {
            "prefill_gain": times["dense"]["prefill"] / times[method]["prefill"],
            "prefill_gain_by_flops": flops["dense"].prefill / flops[method].prefill,
            "first_token_gain": times["dense"]["first_token"] / times[method]["first_token"],
            "first_token_gain_by_flops": flops["dense"].first_token / flops[method].first_token,
            "pruning_ms": cost,
            "pruning_share": cost / times[method][stage],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--optimum", help="optimum-intel's command optimum-cli")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", default="fp32,bf16,int8,int4,methods")
    parser.add_argument("--busy", action="store_true", help="measure although other programs run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tasks = [Task(seed, arguments.new_tokens) for seed in range(1 + arguments.runs)]
    points: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        half = arguments.model == "half-billion"
        model = half_billion_llava(work / "model") if half else Path(arguments.model)
        bench, found = Bench(model, work, arguments.optimum, arguments.threads), {}
        known = groups(arguments.keep)
        for group in arguments.groups.split(","):
            lanes = [lane for lane in known[group] if lane.who != "openvino-genai" or arguments.optimum]
            print(f"measure {group}", flush=True)
            new = measured(bench, lanes, tasks, arguments.threads, arguments.busy)
            for point in new:
                name = f"{point['who']} {point['method']} {point['keep']:g} {point['dtype']} {point['weights']}"
                print(f"{name:45}" + "".join(f"{point[figure]:12.1f}" for figure in FIGURES), flush=True)
            points += [{"group": group, **point} for point in new]
            if group == "methods":
                found = gains(bench, new, arguments.keep, tasks[0])
        parameters = read_spec(model).num_parameters()
    result = {
        "device": device_name(),
        "model": arguments.model,
        "parameters": parameters,
        "keep": arguments.keep,
        "runs": arguments.runs,
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "points": points,
        "gains": found,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
