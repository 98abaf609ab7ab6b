"""profile: where the time of an answer goes, for one bundle or two measured side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vtexport.errors import InputError
from vtexport.measure.machine import device_name
from vtexport.measure.samples import sample_pictures
from vtexport.options import Option
from vtexport.pruning.flops import plan_flops
from vtexport.runtime.generate import generate
from vtexport.runtime.inputs import look
from vtexport.runtime.request import Decoding
from vtexport.runtime.runner import Runner
from vtexport.stopping import die_with

STAGES = ("preprocess", "vision", "prefill", "first_token", "per_token")
QUESTION = "What is shown in this image?"
WARM_UP = 2


@dataclass(frozen=True)
class Stats:
    """Percentiles over the runs, in milliseconds."""

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

    `stages` are measured by the wall clock, `on_device` by the GPU's own clock if there is one. `first_token` is the
    sum of preprocess, vision and prefill of the same run, pruning included; `per_token` is one decode step of the
    whole batch. `gflops` are of one prompt. Memory is that of a separate process that opens the bundle and answers once.
    `visual_tokens` is their number before pruning, `per_layer` what enters each decoder layer; `options` are those of
    the method and of the target, `versions` those of the runtime that compiled the bundle.
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
    model: str = ""
    target: str = ""
    dtype: str = ""
    options: dict[str, Option] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    visual_tokens: int = 0
    per_layer: list[int] = field(default_factory=list)


@dataclass
class Report:
    """A profile; speed-ups are against / this, of medians and of FLOPs; for `layers` see `layer_times`.

    `date` is the day of the measurement in UTC, as YYYY-MM-DD.
    """

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
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        batch: prompts per batch, at least 1.
        new_tokens: tokens decoded per run, at least 2; end tokens are ignored.
        runs: recorded runs per bundle, at least 1, after `WARM_UP` unrecorded ones.
        bucket: which keep ratio of a `--keep auto` bundle to measure; None for the one that the sample photo gets.

    Raises:
        InputError: a number is too small.
    """

    batch: int = 1
    new_tokens: int = 16
    runs: int = 10
    bucket: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch", self.batch, 1),
            ("new-tokens", self.new_tokens, 2),
            ("runs", self.runs, 1),
        ):
            if value < least:
                raise InputError(f"--{name} {value} is too small; give at least {least}")


class _Lane:
    """One bundle being measured."""

    def __init__(self, folder: Path, label: str, settings: Settings) -> None:
        self.runner = Runner.open(folder)
        self.runner.need_language_model()
        if self.runner.given:
            raise InputError(f"{folder} waits for another bundle's ranking; profile the two bundles one by one")
        self.folder, self.settings = folder, settings
        self.image = sample_pictures(self.runner)
        self.bucket = self._bucket(settings.bucket)
        plan = self.runner.plans[self.bucket]
        manifest = self.runner.bundle.manifest
        self.side = Side(
            label,
            plan.method,
            plan.keep,
            plan.mean_visual_tokens,
            model=manifest.model.name,
            target=manifest.target.name,
            dtype=manifest.target.dtype,
            options={**plan.options, **manifest.target.options},
            versions=dict(manifest.target.versions),
            visual_tokens=plan.num_visual_tokens,
            per_layer=list(plan.per_layer),
        )
        self.times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.device_times: dict[str, list[float]] = {}
        self.text_tokens = len(self.runner.prompter.prompt(QUESTION).token_ids)

    def _bucket(self, keep: float | None) -> int:
        """The number of the plan with keep ratio `keep`; if None, of the plan that the sample photo gets."""
        keeps = [plan.keep for plan in self.runner.plans]
        if self.runner.policy is None:
            if keep is not None:
                raise InputError(f"--bucket has no effect: {self.folder} was built for keep {keeps[0]:g} only")
            return 0
        if keep is None:
            vision = look(self.runner.engine, self.runner.plan, [self.runner.request(self.image, QUESTION)])
            return int(self.runner.buckets(vision)[0])
        if keep not in keeps:
            raise InputError(f"--bucket {keep:g} is none of {self.folder}; give {', '.join(f'{k:g}' for k in keeps)}")
        return keeps.index(keep)

    def run(self, record: bool) -> None:
        start = time.perf_counter()
        requests = [self.runner.request(self.image, QUESTION) for _ in range(self.settings.batch)]
        preprocess = 1000 * (time.perf_counter() - start)
        # No end tokens: both sides of a comparison then decode the same number of steps.
        model = self.runner.bundle.manifest.model
        _, timings = generate(
            self.runner.engine,
            self.runner.plans[self.bucket],
            requests,
            Decoding(self.settings.new_tokens, model.max_positions),
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

    def finish(self) -> None:
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
        self.side.peak_memory_bytes = peak_memory(self.folder, replace(self.settings, bucket=keep))


def layer_times(folder: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Milliseconds of each graph's layers over one answer of the bundle in `folder`, the slowest first.

    Measured by the runtime's own profiler, which slows the run down: shares are meaningful, sums are not.
    """
    lane = _Lane(folder, str(folder), settings)
    lane.run(record=False)
    times = lane.runner.engine.layer_times(lambda: lane.run(record=False))
    return {
        graph: dict(sorted(layers.items(), key=lambda layer: -layer[1])) for graph, layers in times.items() if layers
    }


def profile(
    folder: Path,
    against: Path | None = None,
    settings: Settings | None = None,
    *,
    against_label: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Measure the bundle in `folder`, alternating with the one in `against`.

    Args:
        folder: the bundle.
        against: another bundle, or None.
        settings: how to measure; `bucket` applies to the bundle in `folder` only.
        against_label: what to call the other bundle in the report.
        advance: called once per run of all bundles.

    Raises:
        InputError: a bundle that cannot be measured by itself.
    """
    settings = settings or Settings()
    lanes = [_Lane(folder, str(folder), settings)]
    if against is not None:
        lanes.append(_Lane(against, against_label or str(against), replace(settings, bucket=None)))
    for number in range(WARM_UP + settings.runs):
        # The bundles alternate, and each goes first equally often, so that drift of the machine affects both alike.
        for lane in lanes if number % 2 == 0 else reversed(lanes):
            lane.run(record=number >= WARM_UP)
        advance()
    for lane in lanes:
        lane.finish()
    report = _report(lanes[0], settings)
    if against is not None:
        _compare(report, lanes[1].side)
    return report


def _report(lane: _Lane, settings: Settings) -> Report:
    return Report(
        device=device_name(),
        versions={"vtexport": version("vtexport"), **lane.runner.bundle.manifest.target.versions},
        batch=settings.batch,
        text_tokens=lane.text_tokens,
        new_tokens=settings.new_tokens,
        warm_up=WARM_UP,
        runs=settings.runs,
        this=lane.side,
        date=datetime.now(UTC).date().isoformat(),
    )


def _compare(report: Report, other: Side) -> None:
    """Put the other side and the speed-ups against it into `report`."""
    this, report.against = report.this, other
    report.speedup = {stage: round(other.stages[stage].median / this.stages[stage].median, 3) for stage in this.stages}
    report.flops_speedup = {stage: round(other.gflops[stage] / this.gflops[stage], 3) for stage in this.gflops}


def peak_memory(folder: Path, settings: Settings) -> int:
    """Peak resident bytes of a fresh process that opens the bundle and answers once."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=die_with, initargs=(os.getpid(),)) as pool:
        return pool.submit(_answer_once, folder, settings).result()


def _answer_once(folder: Path, settings: Settings) -> int:
    lane = _Lane(folder, "", settings)
    lane.run(record=False)
    # ru_maxrss would also count the parent, of which this process began as a copy.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
