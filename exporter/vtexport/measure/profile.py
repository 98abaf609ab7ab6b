"""profile: where the time of an answer goes, for one bundle or two measured side by side."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError
from vtexport.pruning.flops import plan_flops
from vtexport.runtime.generate import generate, look
from vtexport.runtime.runner import Runner

STAGES = ("preprocess", "vision", "prefill", "first_token", "per_token")
QUESTION = "What is shown in this image?"
WARM_UP = 2


@dataclass(frozen=True)
class Stats:
    """Milliseconds over the runs."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Stats:
        median, p90, p99 = np.percentile(list(values), [50, 90, 99])
        return cls(round(float(median), 4), round(float(p90), 4), round(float(p99), 4))


@dataclass
class Side:
    """One bundle's measurements.

    `stages` are by the wall clock, `on_device` by the GPU's own where there is one. `first_token` is preprocess, vision (pruning included) and prefill of the same run together; `per_token` is one
    decode step of the whole batch. Memory is of a process of its own that opens the bundle and answers once.
    """

    bundle: str
    method: str
    keep: float
    mean_visual_tokens: float
    stages: dict[str, Stats] = field(default_factory=dict)
    on_device: dict[str, Stats] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    cache_bytes: int = 0
    peak_memory_bytes: int = 0


@dataclass
class Report:
    """A profile; `speedup` is against / this, measured on medians and predicted by FLOPs; `layers` see `layer_times`."""

    device: str
    versions: dict[str, str]
    batch: int
    text_tokens: int
    new_tokens: int
    warm_up: int
    runs: int
    this: Side
    against: Side | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    flops_speedup: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Lane:
    """One bundle being measured."""

    def __init__(self, folder: Path, label: str, batch: int, bucket: float | None = None) -> None:
        self.runner = Runner.open(folder)
        self.runner.need_language_model()
        if self.runner.needs_ranking:
            raise InputError(f"{folder} waits for another bundle's ranking; profile the two bundles one by one")
        self.folder = folder
        self.batch = batch
        self.image = sample_pictures(self.runner)
        self.bucket = self._bucket(bucket)
        plan = self.runner.plans[self.bucket]
        self.side = Side(label, plan.method, plan.keep, plan.mean_visual_tokens)
        self.times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.device_times: dict[str, list[float]] = {}
        self.text_tokens = len(self.runner.prompter.prompt(QUESTION).token_ids)

    def _bucket(self, keep: float | None) -> int:
        """The number of the plan of keep ratio `keep`; by default the one that the sample photo gets."""
        keeps = [plan.keep for plan in self.runner.plans]
        if self.runner.policy is None:
            if keep is not None:
                raise InputError(f"--bucket has no effect: {self.folder} was built for keep {keeps[0]:g} only")
            return 0
        if keep is None:
            vision = look(self.runner.engine, self.runner.plan, [self.runner.request(self.image, QUESTION)])
            return int(self.runner.policy.choose(vision.spread)[0])
        if keep not in keeps:
            raise InputError(f"--bucket {keep:g} is none of {self.folder}; give {', '.join(f'{k:g}' for k in keeps)}")
        return keeps.index(keep)

    def run(self, new_tokens: int, record: bool) -> None:
        start = time.perf_counter()
        requests = [self.runner.request(self.image, QUESTION) for _ in range(self.batch)]
        preprocess = 1000 * (time.perf_counter() - start)
        # No end tokens: both sides of a comparison then decode the same number of steps.
        model = self.runner.bundle.manifest.model
        _, timings = generate(
            self.runner.engine,
            self.runner.plans[self.bucket],
            requests,
            new_tokens,
            eos_token_ids=(),
            max_positions=model.max_positions,
            bucket=self.bucket,
        )
        if record:
            self.times["preprocess"].append(preprocess)
            self.times["vision"].append(timings.vision)
            self.times["prefill"].append(timings.prefill)
            self.times["first_token"].append(preprocess + timings.vision + timings.prefill)
            self.times["per_token"] += timings.decode
            self.side.cache_bytes = timings.cache_bytes
            for graph, spent in self.runner.engine.device_times().items():
                self.device_times.setdefault(graph, []).append(spent)

    def finish(self, new_tokens: int) -> None:
        self.side.stages = {stage: Stats.of(times) for stage, times in self.times.items() if times}
        self.side.on_device = {graph: Stats.of(times) for graph, times in self.device_times.items()}
        flops = plan_flops(self.runner.spec, self.runner.plans[self.bucket], self.text_tokens)
        self.side.gflops = {
            "vision": flops.vision / 1e9,
            "prefill": flops.prefill / 1e9,
            "first_token": flops.first_token / 1e9,
            "per_token": flops.decode / 1e9,
        }
        keep = None if self.runner.policy is None else self.side.keep
        self.side.peak_memory_bytes = peak_memory(self.folder, self.batch, new_tokens, keep)


def layer_times(
    folder: Path, *, batch: int = 1, new_tokens: int = 16, bucket: float | None = None
) -> dict[str, dict[str, float]]:
    """Milliseconds of each graph's layers over one answer of the bundle in `folder`, the slowest first.

    By the runtime's own profiler, which slows what it watches: shares count, sums do not. Arguments as for `profile`.
    """
    lane = _Lane(folder, str(folder), batch, bucket)
    lane.run(new_tokens, record=False)
    found = lane.runner.engine.layer_times(lambda: lane.run(new_tokens, record=False))
    return {
        graph: dict(sorted(layers.items(), key=lambda layer: -layer[1])) for graph, layers in found.items() if layers
    }


def profile(
    folder: Path,
    against: Path | None = None,
    *,
    batch: int = 1,
    new_tokens: int = 16,
    runs: int = 10,
    against_label: str | None = None,
    bucket: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Measure the bundle in `folder`, and the one in `against` in turns with it.

    Args:
        folder: the bundle.
        against: another bundle, or None.
        batch: rows a run, at least 1.
        new_tokens: tokens decoded a run, at least 2; end tokens are ignored.
        runs: recorded runs a bundle, at least 1, after `WARM_UP` unrecorded ones.
        against_label: what to call the other bundle in the report.
        bucket: of a bundle with `--keep auto`, the keep ratio to measure; None for the one its sample photo gets.
        advance: called once a run of all bundles.
    """
    for name, value, least in (("batch", batch, 1), ("new-tokens", new_tokens, 2), ("runs", runs, 1)):
        if value < least:
            raise InputError(f"--{name} {value} is too small; give at least {least}")
    lanes = [_Lane(folder, str(folder), batch, bucket)]
    if against is not None:
        lanes.append(_Lane(against, against_label or str(against), batch))
    for number in range(WARM_UP + runs):
        # In turns, and each side first as often as the other: drift of the machine meets both alike.
        for lane in lanes if number % 2 == 0 else reversed(lanes):
            lane.run(new_tokens, record=number >= WARM_UP)
        advance()
    for lane in lanes:
        lane.finish(new_tokens)
    target = lanes[0].runner.bundle.manifest.target
    report = Report(
        device=device_name(),
        versions={"vtexport": version("vtexport"), **target.versions},
        batch=batch,
        text_tokens=lanes[0].text_tokens,
        new_tokens=new_tokens,
        warm_up=WARM_UP,
        runs=runs,
        this=lanes[0].side,
    )
    if against is not None:
        this, other = lanes[0].side, lanes[1].side
        report.against = other
        report.speedup = {
            stage: round(other.stages[stage].median / this.stages[stage].median, 3) for stage in this.stages
        }
        report.flops_speedup = {stage: round(other.gflops[stage] / this.gflops[stage], 3) for stage in this.gflops}
    return report


def sample_photo(size: tuple[int, int] = (640, 480)) -> Any:
    """A picture of soft noise: preprocessing works as it would on a photograph."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def sample_pictures(runner: Runner) -> Any:
    """The sample photo as often as a prompt has images; where they are tiled, of the grid's shape, which costs most."""
    views, side = runner.spec.views, runner.spec.vision.image_size
    photo = sample_photo() if views.tiles is None else sample_photo((views.tiles[1] * side, views.tiles[0] * side))
    return photo if views.pictures == 1 else runner.prompter.grouped([photo] * views.pictures)


def device_name() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def peak_memory(folder: Path, batch: int, new_tokens: int, bucket: float | None = None) -> int:
    """Peak resident bytes of a fresh process that opens the bundle and answers once."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_answer_once, folder, batch, new_tokens, bucket).result()


def _answer_once(folder: Path, batch: int, new_tokens: int, bucket: float | None) -> int:
    lane = _Lane(folder, "", batch, bucket)
    lane.run(new_tokens, record=False)
    # ru_maxrss would count the parent, of which this process began as a copy.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def plot(report: Report, path: Path) -> None:
    """Draw the medians as bars, a row a stage, into `path` (see `vtexport.measure.show.check_destination`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = [side for side in (report.this, report.against) if side is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    stages = [stage for stage in STAGES if stage in report.this.stages]
    height = 0.8 / len(sides)
    for number, side in enumerate(sides):
        places = [i + number * height for i in range(len(stages))]
        medians = [side.stages[stage].median for stage in stages]
        spread = [side.stages[stage].p90 - side.stages[stage].median for stage in stages]
        label = f"{side.method}, keep {side.keep:g} ({side.mean_visual_tokens:g} visual tokens)"
        bars = axes.barh(places, medians, height * 0.92, xerr=[[0] * len(spread), spread], label=label)
        axes.bar_label(bars, fmt="%.2f", padding=6)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(stages))], [s.replace("_", " ") for s in stages])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"median ms, whisker to p90; batch {report.batch}, {report.runs} runs; {report.device}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
