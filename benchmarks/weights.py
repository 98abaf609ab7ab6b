"""Speed and memory of quantised weights on the CPU, by target: dense and pruned.

    python benchmarks/weights.py [--runs 5] [--new-tokens 16] [--method sparsevlm] [--keep 0.25] [--threads 2]
                                 [--model half-billion|NAME|FOLDER] [--json FILE]

Every bundle runs in a process of its own, with the same number of threads, and the bundles of a method take turns. Every
run asks about an image that no run before had. The script stops if other programs keep the machine busy. Times are
medians; memory is the peak of a process that does nothing else. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from models import half_billion_llava
from PIL import Image

from vtexport import BuildOptions, Runner, build
from vtexport.measure.machine import device_name
from vtexport.measure.profile import QUESTION
from vtexport.models import read_spec, resolve_model

TARGETS = ("onnxruntime", "openvino")
WEIGHTS = ("fp32", "int8", "int4")
WARM_UP = 1
#: a share of processor time above this, before a measurement, is other programs' work
BUSY = 0.1
#: seconds over which that share is taken, and seconds to wait for it to fall
WATCH = 5
PATIENCE = 600
FIGURES = ("first_token", "per_token", "slowest_first_token", "peak_mib")


def serve(folder: Path, threads: int) -> None:
    """Be one side: answer a line `SEED TOKENS` on stdin with a line of JSON, until stdin ends."""
    runner = Runner.open(folder, threads, vision_cache=0)
    print("{}", flush=True)
    for line in sys.stdin:
        seed, new_tokens = map(int, line.split())
        pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        start = time.perf_counter()
        runner.request(image, QUESTION)
        preprocess = 1000 * (time.perf_counter() - start)
        answer = runner.ask([(image, QUESTION)], new_tokens)[0]
        times: dict[str, Any] = answer.timings_ms
        found = {
            "first_token": preprocess + times["vision"] + times["prefill"],
            "per_token": times["per_token"],
            "peak_mib": _peak_mib(),
        }
        print(json.dumps({**found, "tokens": answer.token_ids}), flush=True)


def _peak_mib() -> float:
    """This process's peak of resident memory; getrusage would tell its parent's, if that was higher when it started."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


class Side:
    """A bundle in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", str(folder), "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def run(self, seed: int, new_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(seed, new_tokens, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side stopped with exit code {self._process.wait()}; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


def wait_until_quiet() -> None:
    """Return when no other program keeps the processors busy, or stop."""
    start = time.monotonic()
    while (busy := _busy_share()) > BUSY:
        if time.monotonic() - start > PATIENCE:
            raise SystemExit(f"other programs keep this machine {busy:.0%} busy; stop them and run again")


def _busy_share() -> float:
    """The share of all processors' time that was used in the last seconds."""
    before = _processor_times()
    time.sleep(WATCH)
    passed = [now - then for now, then in zip(_processor_times(), before, strict=True)]
    idle = passed[3] + passed[4]
    return 1 - idle / sum(passed)


def _processor_times() -> list[int]:
    """Ticks by kind, of all processors: proc_stat(5)."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]


def measured(
    bundles: dict[tuple[str, str], Path], runs: int, new_tokens: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Medians of each bundle; the bundles take turns, each first as often as last."""
    with ExitStack() as stack:
        sides = {}
        for key, folder in bundles.items():
            sides[key] = Side(folder, threads)
            stack.callback(sides[key].close)
        seen: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in sides}
        for number in range(WARM_UP + runs):
            answers = {key: sides[key].run(number, new_tokens) for key in list(sides)[:: 1 if number % 2 == 0 else -1]}
            if len({str(answers[target, "fp32"]["tokens"]) for target, _ in sides}) > 1:
                raise SystemExit("the targets answer differently in fp32: speed is compared at equal output only")
            for key, answer in answers.items():
                seen[key] += [answer] if number >= WARM_UP else []
    for (target, weights), answers_of in seen.items():
        first = [answer["first_token"] for answer in answers_of]
        yield {
            "target": target,
            "weights": weights,
            "first_token": median(first),
            "slowest_first_token": max(first),
            "per_token": median(answer["per_token"] for answer in answers_of),
            "peak_mib": answers_of[-1]["peak_mib"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--method", default="sparsevlm")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="measure although other programs run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.threads)
        return
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        half = arguments.model == "half-billion"
        folder = half_billion_llava(work / "model") if half else resolve_model(arguments.model)
        parameters = read_spec(folder).num_parameters()
        bundles: dict[tuple[str, float], dict[tuple[str, str], Path]] = {}
        for method, keep in (("dense", 1.0), (arguments.method, arguments.keep)):
            bundles[method, keep] = {}
            for target in TARGETS:
                for weights in WEIGHTS:
                    print(f"build {method}, keep {keep:g}, {weights}, {target}", flush=True)
                    options = {} if weights == "fp32" else {"quantize": weights}
                    # Tests check what the bundles answer; the check of twelve builds would take longer than the rest.
                    wanted = BuildOptions(
                        str(folder), keep, method, target, "fp32", target_options=options, self_check=False
                    )
                    out = work / f"{method}-{target}-{weights}"
                    bundles[method, keep][target, weights] = build(wanted, out).folder
        for (method, keep), sides in bundles.items():
            if not arguments.busy:
                wait_until_quiet()
            print("measure", flush=True)
            for point in measured(sides, arguments.runs, arguments.new_tokens, arguments.threads):
                points.append({"method": method, "keep": keep, **point})
                print(f"{method:10} {point['target']:12} {point['weights']:5}", *(f"{point[f]:9.1f}" for f in FIGURES))
    result = {
        "device": device_name(),
        "model": arguments.model,
        "parameters": parameters,
        "runs": arguments.runs,
        "threads": arguments.threads,
        "points": points,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
