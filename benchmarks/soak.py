"""Long life: thousands of generations in one process, with its memory, open files, threads and latency over time.

    python benchmarks/soak.py [--target onnxruntime,openvino] [--generations N] [--json FILE] [--plot FILE]

A process per target asks micro-llava (sparsevlm, keep 0.25) about new images each time, with prompts of varying length and
1 to 4 of them per batch, and a vision cache of bounded size. A generation is one answer. Afterwards four threads share the
runner, and then four processes the bundle; every answer is compared with that of one thread. A series holds a sample per
100 generations. 10,000 take about three minutes per target on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from apart import report, wait_until_quiet
from PIL import Image

if TYPE_CHECKING:
    from vtexport import Runner

EVERY = 100
NEW_TOKENS = 8
CACHE_BYTES = 2 << 20
WORKERS = 4
#: batches that each thread and process answers
SHARED = 24
WORDS = (
    "what",
    "digit",
    "is",
    "red",
    "and",
    "where",
    "is",
    "the",
    "three",
    "beside",
    "it",
    "how",
    "many",
    "are",
    "there",
)

Sample = dict[str, float]


def question(seed: int) -> tuple[Any, str]:
    """A picture of coarse noise and a prompt of 2 to 14 words; equal seeds give equal ones."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    words = WORDS[: int(random.integers(2, len(WORDS)))]
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC), " ".join(words)


def batch(number: int) -> list[tuple[Any, str]]:
    """The questions of batch `number`: 1 to 4, none of which another batch has."""
    rows = 1 + number % WORKERS
    return [question(WORKERS * number + row) for row in range(rows)]


def sample() -> Sample:
    """What this process holds: MiB of resident memory and of what no other process shares, open files and threads."""
    fields = {}
    for name in ("status", "smaps_rollup"):
        for line in Path("/proc/self", name).read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            fields[key] = value
    unshared = sum(int(fields[f"Private_{kind}"].split()[0]) for kind in ("Clean", "Dirty"))
    return {
        "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "uss_mib": unshared / 1024,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def answers(runner: Runner, numbers: range) -> list[list[int]]:
    """The tokens of every question of these batches."""
    return [answer.token_ids for number in numbers for answer in runner.ask(batch(number), NEW_TOKENS)]


def soak(folder: str, generations: int) -> dict[str, Any]:
    """Answer at least `generations` questions, then some of them again in threads that share the runner."""
    from vtexport import Runner

    runner = Runner.open(folder, vision_cache=CACHE_BYTES)
    runner.ask(batch(0), NEW_TOKENS)
    series: list[Sample] = []
    times: list[float] = []
    latest: list[float] = []
    done = number = 0
    start = time.perf_counter()
    while done < generations:
        questions = batch(number)
        before = time.perf_counter()
        runner.ask(questions, NEW_TOKENS)
        latest.append(1000 * (time.perf_counter() - before) / len(questions))
        number, done = number + 1, done + len(questions)
        if done // EVERY > len(series):
            series.append({"generation": done, **sample(), "ms": median(latest)})
            times, latest = times + latest, []
    seconds = time.perf_counter() - start
    times += latest
    alone = answers(runner, range(SHARED))
    with ThreadPoolExecutor(WORKERS) as pool:
        together = list(pool.map(lambda _: answers(runner, range(SHARED)), range(WORKERS)))
    tenth = max(1, len(times) // 10)
    return {
        "generations": done,
        "seconds": seconds,
        "slope_mib": slope(series[len(series) // 2 :]),
        "first_ms": median(times[:tenth]),
        "last_ms": median(times[-tenth:]),
        "threads_agree": all(one == alone for one in together),
        "after_threads": sample(),
        "tokens": alone,
        "series": series,
    }


def slope(series: list[Sample]) -> float:
    """MiB of unshared memory per 1,000 generations, by least squares."""
    if len(series) < 2:
        return 0.0
    at, held = ([one[name] for one in series] for name in ("generation", "uss_mib"))
    return 1000 * float(np.polyfit(at, held, 1)[0])


def child(arguments: list[str]) -> subprocess.Popen[str]:
    """This script in a process of its own, as one of its parts."""
    return subprocess.Popen([sys.executable, __file__, "--part", *arguments], stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> Any:
    """What such a process printed last."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process stopped with exit code {process.returncode}; its message stands above")
    return json.loads(out.splitlines()[-1])


def part(kind: str, folder: str, generations: str) -> None:
    """What a child does: the soak itself, or one of the processes that share the bundle."""
    from vtexport import Runner

    if kind == "soak":
        print(json.dumps(soak(folder, int(generations))))
    else:
        print(json.dumps(answers(Runner.open(folder, 1), range(SHARED))))


def measure(target: str, generations: int, place: Path) -> dict[str, Any]:
    """The soak of one target, and whether processes that share its bundle answer alike."""
    from vtexport import BuildOptions, build

    folder = place / target
    build(BuildOptions("micro-llava", 0.25, "sparsevlm", target=target, dtype="fp32", self_check=False), folder)
    found: dict[str, Any] = result_of(child(["soak", str(folder), str(generations)]))
    processes = [child(["share", str(folder), "0"]) for _ in range(WORKERS)]
    alone = found.pop("tokens")
    shared = [result_of(process) for process in processes]
    found["processes_agree"] = all(one == alone for one in shared)
    return {"target": target, **found}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Memory and latency over the generations, a line per target."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, (name, label) in zip(
        axes, (("uss_mib", "unshared memory, MiB"), ("ms", "median per answer, ms")), strict=True
    ):
        for point in points:
            axis.plot(*([one[key] for one in point["series"]] for key in ("generation", name)), label=point["target"])
        axis.set(xlabel="generations", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        return part(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="onnxruntime,openvino", help="targets, separated by commas")
    parser.add_argument("--generations", type=int, default=10_000, help="answers per target")
    parser.add_argument("--busy", action="store_true", help="measure although other programs run")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw the series into this file")
    given = parser.parse_args()
    if not given.busy:
        wait_until_quiet()
    with tempfile.TemporaryDirectory() as place:
        points = [measure(target, given.generations, Path(place)) for target in given.target.split(",")]
    if given.plot is not None:
        plot(points, given.plot)
    report({"method": "sparsevlm", "keep": 0.25, "new_tokens": NEW_TOKENS, "points": points}, given.json)
    return None


if __name__ == "__main__":
    main()
