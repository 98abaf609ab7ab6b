"""The documentation's tables: measurements from benchmarks/results.json, options from the classes that declare them.

    python benchmarks/tables.py [--check]

Rewrites every block between `<!-- table: NAME -->` and `<!-- end -->` in README.md, docs/*.md and
benchmarks/RESULTS.md. With --check nothing is written, and the exit code is 1 if a block is out of date.

A table is a function of the results, listed in `TABLES` under the name that blocks use. Figures are rounded by the
functions `percent`, `count` and `milliseconds` and nowhere else, so that a figure reads the same wherever it stands.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.json")
KEEPS = (0.5, 0.33, 0.25, 0.17, 0.11)
SHORT_KEEPS = (0.5, 0.33, 0.25, 0.11)
SHORT_METHODS = ("dense", "sparsevlm", "fastv", "fastervlm+sparsevlm", "fastervlm", "divprune", "random")
KINDS = ("digit", "colour", "where", "count")
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)

Results = dict[str, Any]
Point = dict[str, Any]


def percent(share: float) -> str:
    """0.9942 -> 99.4%."""
    return f"{share:.1%}"


def whole_percent(share: float) -> str:
    """0.86 -> 86%, for shares that were recorded to a per cent."""
    return f"{share:.0%}"


def count(number: float) -> str:
    """144.0 -> 144, 47.22 -> 47.2."""
    return f"{number:.1f}".removesuffix(".0")


def milliseconds(time: float | None) -> str:
    """2749.4 -> 2749, 80.38 -> 80.4; empty for a stage that was not measured separately."""
    return "" if time is None else f"{time:.0f}" if time >= 100 else f"{time:.1f}"


def factor(number: float) -> str:
    """2.2148 -> 2.21x."""
    return f"{number:.2f}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def accuracy_points(results: Results) -> dict[tuple[str, float], Point]:
    """Points without options by method and keep ratio; the mean over seeds."""
    grouped: dict[tuple[str, float], list[Point]] = {}
    for point in results["accuracy"]["result"]["points"]:
        if all(name == "seed" for name, _ in point["options"]):
            grouped.setdefault((point["method"], point["keep"]), []).append(point)
    return {key: _mean(points) for key, points in grouped.items()}


def _mean(points: list[Point]) -> Point:
    if "accuracy" not in points[0]:
        return points[0]
    return {**points[0], "accuracy": mean(point["accuracy"] for point in points)}


def _cell(point: Point | None) -> str:
    """Accuracy and mean visual tokens; empty if the keep ratio is out of the method's reach."""
    if point is None or "accuracy" not in point:
        return ""
    return f"{percent(point['accuracy'])} ({count(point['tokens'])})"


def _accuracy(results: Results, methods: Sequence[str], keeps: Sequence[float]) -> str:
    points = accuracy_points(results)
    rows = []
    for method in methods:
        cells = [points.get((method, 1.0 if method == "dense" else keep)) for keep in keeps]
        rows.append([f"`{method}`", *map(_cell, cells)])
    return table(["method", *(f"keep {keep:g}" for keep in keeps)], rows)


def accuracy(results: Results) -> str:
    """Every method at every keep ratio."""
    methods = dict.fromkeys(method for method, _ in accuracy_points(results))
    return _accuracy(results, list(methods), KEEPS)


def accuracy_short(results: Results) -> str:
    """The main methods."""
    return _accuracy(results, SHORT_METHODS, SHORT_KEEPS)


def accuracy_by_kind(results: Results) -> str:
    """Accuracy by the four kinds of questions."""
    points, blank = accuracy_points(results), results["blank_image"]["result"]
    rows = [
        ("dense", points["dense", 1.0], percent),
        ("`sparsevlm`, keep 0.33", points["sparsevlm", 0.33], whole_percent),
        ("`sparsevlm`, keep 0.11", points["sparsevlm", 0.11], whole_percent),
        ("dense, image blacked out", blank, percent),
    ]
    lines = [
        [name, percent(point["accuracy"]), *(shown(point["by_kind"][kind]) for kind in KINDS)]
        for name, point, shown in rows
    ]
    return table(["", "all", *KINDS], lines)


def rules(results: Results) -> str:
    """The two rules of sparsevlm's schedule, for the same layers."""
    by_rule: dict[tuple[str, str], dict[float, Point]] = {}
    for point in results["accuracy"]["result"]["points"]:
        options = dict(point["options"])
        if "rule" in options:
            by_rule.setdefault((options["layers"], options["rule"]), {})[point["keep"]] = point
    rows = [[layers, f"`{rule}`", *(_cell(row.get(keep)) for keep in KEEPS)] for (layers, rule), row in by_rule.items()]
    return table(["layers", "rule", *(f"keep {keep:g}" for keep in KEEPS)], rows)


def sparsevlm_options(results: Results) -> str:
    """The effect of recycling and positions."""
    dense = accuracy_points(results)["dense", 1.0]["accuracy"]
    flags = {("positions", "original"): "`--positions original`", ("recycle", 0): "`--no-recycle`"}
    rows = []
    for point in results["sparsevlm_options"]["result"]["points"]:
        given = [flags[name, value] for name, value in point["options"]]
        rows.append(
            [
                ", ".join([f"keep {point['keep']:g}", *given]),
                percent(point["accuracy"]),
                percent(point["accuracy"] / dense),
                f"-{whole_percent(1 - point['flops'])}",
            ]
        )
    return table(["`sparsevlm`", "right", "of dense", "decoder FLOPs"], rows)


def adaptive(results: Results) -> str:
    """`--keep auto` beside one keep ratio with the same mean tokens."""
    rows = []
    for row in results["adaptive"]["result"]["rows"]:
        ours, fixed = row["adaptive"], row["fixed"]
        shares = ", ".join(
            f"{float(keep):g}: {whole_percent(share)}" for keep, share in ours["shares"].items() if share
        )
        cells = [cell for side in (ours, fixed) for cell in (percent(side["accuracy"]), count(side["tokens"]))]
        rows.append([f"{row['target']:g}", *cells, shares])
    header = ["target accuracy", "`--keep auto`", "mean tokens", "one keep ratio", "mean tokens"]
    return table([*header, "questions at each ratio"], rows)


def quantized(results: Results) -> str:
    """What rounding the decoder's weights costs."""
    by_plan: dict[tuple[str, float], dict[str, Point]] = {}
    for point in results["quantized"]["result"]["points"]:
        by_plan.setdefault((point["method"], point["keep"]), {})[point["weights"]] = point
    weights = list(next(iter(by_plan.values())))
    rows = [
        [
            f"`{method}`, keep {keep:g}",
            count(row["fp32"]["tokens"]),
            *(percent(row[side]["accuracy"]) for side in weights),
        ]
        for (method, keep), row in by_plan.items()
    ]
    return table(["", "mean tokens", *weights], rows)


def quantized_size(results: Results) -> str:
    """Sizes of micro-llava's bundles."""
    bundles = results["quantized_size"]["result"]["bundles"]
    return table(
        ["decoder weights", "bundle"], [[bundle["weights"], f"{count(bundle['mb'])} MB"] for bundle in bundles]
    )


def quantized_speed(results: Results) -> str:
    """Time, memory and accuracy of quantised weights on the CPU, dense and pruned."""
    by_side: dict[tuple[str, str, str], dict[str, Point]] = {}
    for point in results["cpu"]["result"]["points"]:
        if point["group"] != "methods" and point["who"] in _TARGETS:
            side = point["who"], point["dtype"], point["weights"]
            by_side.setdefault(side, {})[point["method"]] = point
    right = {
        (point["method"], point["keep"], point["weights"]): percent(point["accuracy"])
        for point in results["quantized"]["result"]["points"]
    }
    rows = []
    for (target, dtype, weights), plans in by_side.items():
        column = f"{weights}, {_TARGETS[target]}" if weights else dtype
        cells = [cell for method in ("dense", "sparsevlm") for cell in _speed_cells(plans[method])]
        accuracy = [right.get((*plan, column), "") for plan in (("dense", 1.0), ("sparsevlm", 0.44))]
        rows.append([f"`{target}`", weights or "as they are", dtype, *cells, *accuracy])
    keep = f"`sparsevlm`, keep {results['cpu']['result']['keep']:g}"
    timed = [f"{plan}: {what}" for plan in ("dense", keep) for what in ("first token", "per token", "peak")]
    return table(["target", "weights", "dtype", *timed, "accuracy: dense", "accuracy: `sparsevlm`, keep 0.44"], rows)


_TARGETS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def _speed_cells(point: Point) -> list[str]:
    times = [f"{milliseconds(point[stage])} ms" for stage in ("first_token", "per_token")]
    return [*times, f"{point['peak_mib'] / 1024:.1f} GiB"]


def _selection_points(results: Results) -> dict[tuple[str, float, str], Point]:
    """The points of `benchmarks/selection.py` by method, keep ratio and the layer that was asked for."""
    points = results["selection"]["result"]["points"]
    return {(point["method"], point["keep"], dict(point["options"]).get("layers", "")): point for point in points}


def selection(results: Results) -> str:
    """Exact pruning, a dense decoder elsewhere that gets what the method chose, and what a vision-stage method keeps."""
    points = _selection_points(results)
    dense = points["dense", 1.0, ""]
    rows = [["dense", count(dense["tokens"]), percent(dense["accuracy"]), "", "", whole_percent(1.0), "", ""]]
    for name, keep, layer in points:
        if not name.startswith("select ") or layer:
            continue
        method = name.removeprefix("select ")
        sides = [points[side, keep, ""] for side in (method, name, "fastervlm")]
        shown = [
            [percent(side["accuracy"]), whole_percent(side["flops"])] if "flops" in side else ["", ""] for side in sides
        ]
        accuracies, flops = zip(*shown, strict=True)
        rows.append([f"`{method}`, keep {keep:g}", count(sides[1]["tokens"]), *accuracies, *flops])
    sides_named = ["exact", "select", "`fastervlm`"]
    return table(["", "tokens", *sides_named, *(f"FLOPs: {side}" for side in sides_named)], rows)


def selection_layers(results: Results) -> str:
    """What a dense decoder elsewhere answers by the layer after which its tokens were chosen."""
    tried: dict[tuple[str, float], dict[str, Point]] = {}
    for (name, keep, layer), point in _selection_points(results).items():
        if layer:
            tried.setdefault((name, keep), {})[layer] = point
    layers = list(next(iter(tried.values())))
    rows = [
        [f"`{name.removeprefix('select ')}`, keep {keep:g}"]
        + [f"{percent(row[layer]['accuracy'])} ({whole_percent(row[layer]['flops'])})" for layer in layers]
        for (name, keep), row in tried.items()
    ]
    return table(["select after layer", *layers], rows)


def conversation(results: Results) -> str:
    """A second question alone and after another one: accuracy, and the patches of the digits that are asked about."""
    rows = []
    for point in results["conversation"]["result"]["points"]:
        dense = point["method"] == "dense"
        shares = [point[name] for name in ("asked_alone", "unasked_alone", "asked_second", "asked_before")]
        rows.append(
            [
                f"`{point['method']}`" if dense else f"`{point['method']}`, keep {point['keep']:g}",
                count(point["last_kept"]),
                percent(point["accuracy_alone"]),
                percent(point["accuracy_second"]),
                *(whole_percent(share) for share in shares),
            ]
        )
    header = ["", "tokens that stay", "right: alone", "right: second turn"]
    patches = ["alone, its digit", "alone, another digit", "second turn, its digit", "second turn, the first's digit"]
    return table([*header, *(f"patches kept: {which}" for which in patches)], rows)


def latency_short(results: Results) -> str:
    """Of each precision, OpenVINO GenAI and vtexport's target that is ahead in it, dense and pruned."""
    ahead = {"fp32": "openvino", "bf16": "openvino", "int8": "openvino"}
    rows = [
        [_precision(point), _side(point), milliseconds(point["first_token"]), milliseconds(point["per_token"])]
        for point in results["cpu"]["result"]["points"]
        if point["who"] in ("openvino-genai", "transformers", ahead.get(point["group"]))
    ]
    return table(["precision", "side", "first token, ms", "per token, ms"], rows)


def latency(results: Results) -> str:
    """Every side's times and memory, by precision; and its times against OpenVINO GenAI's."""
    points = [point for point in results["cpu"]["result"]["points"] if point["group"] != "methods"]
    genai = {point["group"]: point for point in points if point["who"] == "openvino-genai"}
    rows = []
    for point in points:
        spread = f"{milliseconds(point['fastest_first_token'])} to {milliseconds(point['slowest_first_token'])}"
        peer = genai.get(point["group"])
        against = [factor(peer[stage] / point[stage]) if peer else "" for stage in ("first_token", "per_token")]
        rows.append(
            [
                _precision(point),
                _side(point),
                f"{milliseconds(point['first_token'])} ({spread})",
                milliseconds(point["per_token"]),
                f"{point['peak_mib'] / 1024:.1f} GiB",
                *against,
            ]
        )
    header = ["precision", "side", "first token, ms", "per token, ms", "peak"]
    return table([*header, "first token against GenAI", "per token"], rows)


def _precision(point: Point) -> str:
    return f"{point['weights']} weights, {point['dtype']}" if point["weights"] else str(point["dtype"])


def _side(point: Point) -> str:
    """A side as tables call it."""
    plan = "dense" if point["method"] == "dense" else f"`{point['method']}`, keep {point['keep']:g}"
    names = {"openvino-genai": "OpenVINO GenAI", "transformers": "transformers (sdpa)", "hooks": "transformers, hooks"}
    who = names.get(point["who"])
    return f"{who}, {plan}" if who else f"vtexport on `{point['who']}`, {plan}"


def latency_ratios(results: Results) -> str:
    """How many times as fast one side is as another."""
    by_side = {(point["group"], point["who"], point["method"]): point for point in results["cpu"]["result"]["points"]}
    pairs = [
        ("vtexport `dense` against transformers", "fp32", ("transformers", "dense"), ("onnxruntime", "dense")),
        (
            "vtexport `sparsevlm` against the same method as Python hooks",
            "methods",
            ("hooks", "sparsevlm"),
            ("onnxruntime", "sparsevlm"),
        ),
        *(
            (
                f"`sparsevlm` against `dense` on `{target}`, {group}",
                group,
                (target, "dense"),
                (target, "sparsevlm"),
            )
            for group in ("fp32", "bf16", "int8", "int4")
            for target in _TARGETS
            if (group, target, "dense") in by_side
        ),
    ]
    rows = []
    for name, group, slow, fast in pairs:
        one, other = by_side[group, *slow], by_side[group, *fast]
        rows.append([name, *(factor(one[stage] / other[stage]) for stage in ("first_token", "per_token"))])
    return table(["", "first token", "per token"], rows)


def latency_gains(results: Results) -> str:
    """Pruned against dense, measured and predicted."""
    measured = results["cpu"]["result"]
    rows = []
    for method, stage in (("sparsevlm", "prefill"), ("fastervlm", "vision")):
        gain = measured["gains"][method]
        share = gain["first_token_gain"] / gain["first_token_gain_by_flops"]
        rows.append(
            [
                f"`{method}`",
                factor(gain["prefill_gain"]),
                factor(gain["prefill_gain_by_flops"]),
                factor(gain["first_token_gain"]),
                factor(gain["first_token_gain_by_flops"]),
                whole_percent(share),
                f"{gain['pruning_ms']:.1f} ms, {percent(gain['pruning_share'])} of {stage}",
            ]
        )
    header = ["prefill", "by FLOPs", "first token", "by FLOPs", "share reached", "pruning itself"]
    return table([f"keep {measured['keep']:g} against vtexport `dense`", *header], rows)


def where(results: Results) -> str:
    """Dense against pruned by visual tokens, text tokens and prompts per batch."""
    measured = results["where"]["result"]
    rows = []
    for point in measured["points"]:
        dense, pruned = point["dense"], point[measured["method"]]
        cells = []
        for stage in ("first_token", "total"):
            times = [f"{side[stage] / 1000:.1f} s" for side in (dense, pruned)]
            cells += [*times, factor(dense[stage] / pruned[stage])]
        rows.append([str(point["visual"]), str(int(dense["text"])), str(point["rows"]), *cells])
    plan, tokens = f"`{measured['method']}`, keep {measured['keep']:g}", measured["new_tokens"]
    header = ["visual tokens", "text tokens", "prompts", "first token: dense", plan, "gain"]
    return table([*header, f"{tokens} tokens: dense", plan, "gain"], rows)


def serving(results: Results) -> str:
    """What clients get together from `vtexport serve`, one request at a time and batched."""
    points = results["serving"]["result"]["points"]
    alone = {point["method"]: point for point in points if point["slots"] == 1}
    rows = []
    for point in points:
        plan = "`dense`" if point["method"] == "dense" else f"`{point['method']}`, keep {point['keep']:g}"
        against = point["tokens_per_second"] / alone[point["method"]]["tokens_per_second"]
        times = [f"{point[name]:.1f} s" for name in ("first_token", "total", "slowest")]
        rate = f"{point['tokens_per_second']:.1f}"
        rows.append([plan, str(point["slots"]), rate, factor(against), *times, f"{point['peak_mib'] / 1024:.1f} GiB"])
    header = ["", "slots", "tokens per second", "against 1 slot", "first token", "whole answer", "slowest answer"]
    return table([*header, "peak"], rows)


def soak(results: Results) -> str:
    """What thousands of generations do to a process: memory, open files, threads and latency."""
    rows = []
    for point in results["soak"]["result"]["points"]:
        first, last = point["series"][0], point["series"][-1]
        memory = [f"{one['uss_mib']:.0f} MiB" for one in (first, last)]
        held = [f"{first[name]} / {last[name]}" for name in ("handles", "threads")]
        same = "yes" if point["threads_agree"] and point["processes_agree"] else "no"
        times = [milliseconds(point[name]) for name in ("first_ms", "last_ms")]
        slope = f"{point['slope_mib']:+.2f} MiB"
        rows.append([point["target"], f"{point['generations']:,}", *memory, slope, *held, *times, same])
    header = ["target", "generations", "memory at first", "at last", "growth per 1,000, last half", "files", "threads"]
    return table([*header, "first tenth, ms", "last tenth, ms", "threads and processes answer alike"], rows)


#: what a fuzzed file is called
FUZZED = {
    "calibration": "calibration file",
    "config": "`config.json` of every family",
    "generation": "`generation_config.json`",
    "image": "image",
    "index": "safetensors index",
    "manifest": "`manifest.json`",
    "messages": "conversation",
    "pairs": "JSON lines of pairs",
    "questions": "JSON lines of questions",
    "recipe": "recipe",
    "request": "request to the server",
    "safetensors": "safetensors header",
    "template": "chat template",
    "tokenizer": "tokenizer and image processor",
    "video": "animation",
}


def fuzz(results: Results) -> str:
    """What became of damaged files, of those drawn by chance and of those that coverage led to."""
    runs = [{one["target"]: one for one in run["targets"]} for run in results["fuzz"]["result"]["runs"]]
    counted = []
    for target in runs[0]:
        numbers: list[int] = []
        for run in runs:
            one = run[target]
            numbers += [one["executions"], one["accepted"], sum(found["count"] for found in one["findings"])]
        counted.append((FUZZED[target], *numbers))
    together = ("together", *(sum(numbers) for numbers in list(zip(*counted, strict=True))[1:]))
    rows = [[name, *(f"{number:,}" for number in numbers)] for name, *numbers in [*counted, together]]
    return table(["file", "by chance", "used", "failed", "by coverage", "used", "failed"], rows)


def kills(results: Results) -> str:
    """What processes left that were killed."""
    rows = []
    for trial in results["kills"]["result"]["runs"]:
        for name, one in trial["results"].items():
            command, signal = name.split()
            found = [str(one["states"].get(state, 0)) for state in ("old", "new")]
            shown = {"force": "build --force"}.get(command, command)
            numbers = [str(one["moments"]), *found, str(one["leftovers"]), str(len(one["wrong"]))]
            rows.append([trial["model"], f"`{shown}`", f"SIG{signal}", *numbers])
    header = ["model", "command", "signal", "moments", "old result, whole", "new result, whole"]
    return table([*header, "left a folder or file behind", "anything wrong"], rows)


#: dependencies whose releases the table of compatibility shows
SHOWN = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt-rtx-cu13-libs")


def compatibility(results: Results) -> str:
    """The releases with which the tests pass."""
    rows = []
    for one in results["compatibility"]["result"]["sets"]:
        counts = [f"{one.get(name, 0):,}" for name in ("passed", "skipped")] + [str(len(one["failed"]))]
        rows.append([one["set"], *(one["versions"][name] for name in SHOWN), *counts])
    return table(["releases", *SHOWN[:-1], "TensorRT for RTX", "passed", "skipped", "failed"], rows)


def aiperf(results: Results) -> str:
    """AIPerf's figures of one server."""
    found = results["aiperf"]["result"]
    named = {
        "time_to_first_token": "time to first token, ms",
        "inter_token_latency": "time per further token, ms",
        "request_latency": "request, ms",
    }
    rows = [
        [text, *(milliseconds(found[name][which]) for which in ("p50", "p90", "p99"))] for name, text in named.items()
    ]
    return table(["", "median", "90%", "99%"], rows)


def builds(results: Results) -> str:
    """Time, memory and disk space of large builds."""
    rows = []
    for build in results["builds"]["result"]["builds"]:
        size = build.get("bundle_mb")
        shown = "" if size is None else f"{count(size)} MB" if size < 1000 else f"{count(size / 1000)} GB"
        apart = " besides the weights" if build.get("weights_apart") else ""
        cells = [f"{build['wall_s']} s", f"{build['resident_gb']:g} GB", shown + apart]
        rows.append([build["model"], build["options"], *cells])
    return table(["checkpoint", "options", "wall time", "peak resident memory", "bundle"], rows)


def install(results: Results) -> str:
    """Time and disk space of installing."""
    rows = [
        [trial["compilers"], f"{trial['seconds']} s", f"{count(trial['wheel_mb'])} MB" if "wheel_mb" in trial else ""]
        for trial in results["install"]["result"]["installs"]
    ]
    return table(["compilers found", "`pip install`, dependencies apart", "wheel"], rows)


def method_options(_results: Results) -> str:
    """The options of every method, as flags of `vtexport build`."""
    from vtexport.pruning import METHODS
    from vtexport.pruning.method import Combination

    return _options({**METHODS, "two methods": Combination})


def target_options(_results: Results) -> str:
    """The options of every target, as flags of `vtexport build`."""
    from vtexport.targets import TARGETS

    return _options(dict(TARGETS))


def _options(owners: dict[str, type]) -> str:
    """A row for each option, whichever class declares it."""
    from vtexport.options import OptionField, option_fields

    by_flag: dict[str, dict[str, OptionField]] = {}
    for name, owner in owners.items():
        for option in option_fields(owner).values():
            if not option.extra.get("resolved"):
                by_flag.setdefault(option.flag, {})[name] = option
    rows = []
    for flag, options in by_flag.items():
        first = next(iter(options.values()))
        values = dict.fromkeys(value for option in options.values() for value in option.choices if value)
        defaults: dict[str, list[str]] = {}
        for name, option in options.items():
            defaults.setdefault(_default(option), []).append(name)
        usual, *others = defaults
        default = "; ".join([usual, *(f"{', '.join(defaults[other])}: {other}" for other in others)])
        text = first.help.replace("|", "\\|") + (f" One of {', '.join(values)}." if len(values) > 1 else "")
        rows.append([f"`{flag}`", default, ", ".join(name if " " in name else f"`{name}`" for name in options), text])
    return table(["flag", "default", "of", "what it does"], rows)


def _default(option: Any) -> str:
    """An option's default, in words."""
    default = option.extra.get("default", option.default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


TABLES: dict[str, Callable[[Results], str]] = {
    "accuracy": accuracy,
    "accuracy-short": accuracy_short,
    "accuracy-by-kind": accuracy_by_kind,
    "rules": rules,
    "sparsevlm-options": sparsevlm_options,
    "adaptive": adaptive,
    "quantized": quantized,
    "quantized-size": quantized_size,
    "quantized-speed": quantized_speed,
    "where": where,
    "selection": selection,
    "selection-layers": selection_layers,
    "conversation": conversation,
    "latency": latency,
    "latency-short": latency_short,
    "latency-ratios": latency_ratios,
    "latency-gains": latency_gains,
    "serving": serving,
    "aiperf": aiperf,
    "soak": soak,
    "fuzz": fuzz,
    "kills": kills,
    "compatibility": compatibility,
    "builds": builds,
    "install": install,
    "method-options": method_options,
    "target-options": target_options,
}


def pages() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]


def rendered(text: str, results: Results) -> str:
    """`text` with every table block up to date.

    Raises:
        KeyError: a block names no table.
    """
    return BLOCK.sub(lambda found: found[1] + TABLES[found["name"]](results) + found[4], text)


def outdated() -> dict[Path, str]:
    """The pages with outdated tables, each with the text that it should have."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    return {page: new for page, text in texts.items() if (new := rendered(text, results)) != text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    changed = outdated()
    for page, text in changed.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
    if check and changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
