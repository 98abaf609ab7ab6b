"""What pruning saves on a GPU without an engine: the graphs run by PyTorch, at a real geometry with random weights.

    python benchmarks/gpu.py [--geometry llava-1.5-7b] [--device cuda] [--methods sparsevlm,fastervlm,…] [--batch 1]
        [--text 64] [--runs 20] [--json FILE]

First the ops of one stage: native kernels, eager PyTorch, torch.compile, and the share of the GPU's limits that the
kernels reach. Then dense against every method at every budget of SparseVLM's released schedules (as keep ratios, so
that they fit any depth): vision tower, prefill and decode, in bf16 with PyTorch's fused attention, each captured in a
CUDA graph if possible; the pruning ops alone; KV cache and peak memory. Both sides of every ratio are measured in one
run, alternating. Prints Markdown tables; the last line is one JSON object. `--geometry tiny --device cpu` tries out the
script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import Clock, captured, in_turns
from kernels import kernel_table, measure_kernels
from torch import Tensor, nn

from vtexport.errors import InputError
from vtexport.graph.graphs import DecodeGraph, PrefillGraph
from vtexport.graph.vision import VisionGraph
from vtexport.models.families import FAMILIES
from vtexport.models.rope import rope_tables
from vtexport.models.spec import ModelSpec, ViewChoice
from vtexport.models.views import rows_of
from vtexport.native import kernels as native
from vtexport.pruning import METHODS, Geometry, PruningPlan, make_plan, ops
from vtexport.pruning.schedule import Recycling

# Mean visual tokens of SparseVLM's schedules 192, 128 and 64, as shares of 576.
KEEPS = (206.5 / 576, 145.4 / 576, 82.3 / 576)
# The others need another model or a calibration.
DEFAULT_METHODS = [method for method in METHODS if method not in ("dense", "cdpruner", "exit", "sgl")]
# Methods whose pruning consists of the ops alone, which are then measured separately too.
PRICED = ("sparsevlm", "fastv", "pyramiddrop", "fastervlm", "vtc-cls", "random")
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VICUNA = {"vocab_size": 32064, "max_position_embeddings": 4096, "eos_token_id": 2}
GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava-1.5-7b": (
        {**_CLIP_L, "image_size": 336, "patch_size": 14},
        {**_VICUNA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "llava-1.5-13b": (
        {**_CLIP_L, "image_size": 336, "patch_size": 14},
        {**_VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
    "llava-next-7b": (
        {**_CLIP_L, "image_size": 336, "patch_size": 14},
        {**_VICUNA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 96,
         "patch_size": 8},
        {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32, "num_attention_heads": 4,
         "max_position_embeddings": 2048, "eos_token_id": 2},
    ),
}  # fmt: skip
GEOMETRIES["tiny-next"] = GEOMETRIES["tiny"]
# Every image fills its grid of tiles, the most expensive case.
GRID = "2x2"


@dataclass(frozen=True)
class Side:
    """One plan's median milliseconds; `captured`: whether prefill ran as a CUDA graph; `pruning`: the ops alone."""

    name: str
    mean_visual_tokens: float
    vision: float
    prefill: float
    per_token: float
    pruning: float | None
    cache_bytes: int
    captured: bool

    @property
    def first_token(self) -> float:
        return self.vision + self.prefill


def geometry(name: str) -> ModelSpec:
    """The spec of the LLaVA called `name`."""
    vision, text = GEOMETRIES[name]
    tiled = name.removesuffix("-7b").endswith("next")
    tile = vision["image_size"]
    config = {
        "model_type": "llava_next" if tiled else "llava",
        **({"image_grid_pinpoints": [[2 * tile, 2 * tile]]} if tiled else {}),
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "llama", **text},
        "image_token_index": 4,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }
    family = FAMILIES[str(config["model_type"])]
    return family.spec(Path(name), config, ViewChoice(grid=GRID) if tiled else ViewChoice())


def filled(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """`module`, made on the meta device, with random weights on `device`, so that no weight is ever in memory twice."""
    module.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return module.eval().requires_grad_(False)


class Bench:
    """One geometry on one device; plans share the decoder's weights."""

    def __init__(self, name: str, device: str, batch: int, text: int) -> None:
        self.spec, self.device, self.batch, self.text = geometry(name), device, batch, text
        self.dtype = torch.bfloat16
        with torch.device("meta"):
            base = DecodeGraph(self.spec)
        self.decode: Any = filled(base, device, self.dtype)
        rope: Any = self.decode.rope
        for buffer, values in zip((rope.cos, rope.sin), rope_tables(self.spec), strict=True):
            buffer.copy_(values)

    def calls(self, plan: PruningPlan) -> dict[str, Callable[[], Any]]:
        """Calls of vision, prefill, one decode step, and the pruning ops alone."""
        v, d = self.spec.vision, self.spec.decoder
        with torch.device("meta"):
            vision, prefill = VisionGraph(self.spec, [plan]), PrefillGraph(self.spec, plan)
        filled(vision, self.device, self.dtype)
        prefill.decoder, prefill.rope, prefill.head = self.decode.decoder, self.decode.rope, self.decode.head
        on = partial(torch.full, device=self.device, dtype=torch.int64)
        views = self.spec.views
        seen = [torch.rand(self.batch * views.total, v.channels, v.image_size, v.image_size, device=self.device)]
        if views.total > 1:
            seen = [seen[0].unflatten(0, (self.batch, views.total))]
        lengths: list[Tensor] = []
        if views.tiles is not None:
            edges = (views.tiles[0] * v.image_size, views.tiles[1] * v.image_size)
            rows = rows_of(self.spec, [edges])
            places = (rows.sequence, rows.row_start)[: len(vision.input_names()) - 1]
            seen += [torch.from_numpy(array).to(self.device).expand(self.batch, -1) for array in places]
            lengths = [on((self.batch, 1), plan.vision_tokens)]
        ids = torch.randint(0, d.vocab_size, (self.batch, self.text), device=self.device)
        visual = torch.randn(self.batch, plan.vision_tokens, d.hidden_size, device=self.device, dtype=self.dtype)
        past = [
            torch.zeros(
                self.batch, d.num_kv_heads, n + self.text + 1, d.head_size, device=self.device, dtype=self.dtype
            )
            for n in plan.per_layer
            for _ in ("key", "value")
        ]
        length = torch.tensor(plan.per_layer, device=self.device)[:, None].expand(-1, self.batch) + self.text
        return {
            "vision": lambda: vision(*seen),
            "prefill": lambda: prefill(ids, on((self.batch,), 5), on((self.batch,), self.text), visual, *lengths),
            "per_token": lambda: self.decode(ids[:, :1], length, length, *past),
            **({"pruning": self._pruning(plan)} if plan.method in PRICED else {}),
        }

    def _pruning(self, plan: PruningPlan) -> Callable[[], Any]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        calls: list[Callable[[], Any]] = []
        v, d = self.spec.vision, self.spec.decoder
        for stage in plan.stages:
            inside = stage.layer is not None
            # In the vision stage every view is pruned by itself.
            n, keep, batch = stage.tokens_in, stage.kept, self.batch
            if not inside:
                n, keep, batch = v.num_patches, plan.patch_budget, self.batch * plan.views
            heads, groups, size = (
                (d.num_heads, d.num_kv_heads, d.head_size) if inside else (v.num_heads,) * 2 + (v.head_size,)
            )
            rows, keys = (self.text, n + self.text) if inside else (1, n + 1)
            hidden = random(batch, n, d.hidden_size if inside else v.hidden_size)
            score = torch.rand(batch, n, device=self.device)
            places = torch.full((batch, rows), keys - 1, device=self.device)
            start = torch.ones(batch, device=self.device, dtype=torch.int64)
            query, key = random(batch, heads, rows, size), random(batch, groups, keys, size)
            calls.append(partial(ops.token_score, query, key, places, start, n, size**-0.5))
            calls.append(partial(ops.token_select, hidden, score, keep))
            if stage.recycled:
                pool, clusters = Recycling().counts(n - keep)
                rank = score.argsort(dim=1).int()
                calls.append(partial(ops.token_recycle, hidden, rank, keep, pool, clusters, False))
        return lambda: [call() for call in calls]

    def cache_bytes(self, plan: PruningPlan) -> int:
        d = self.spec.decoder
        rows = sum(n + self.text for n in plan.per_layer)
        return 2 * self.batch * rows * d.num_kv_heads * d.head_size * self.dtype.itemsize


def measure(bench: Bench, methods: Sequence[str], runs: int) -> list[Side]:
    """Measure all sides, alternating so that drift affects them alike; leave out budgets that a method cannot reach."""
    plan_of = partial(make_plan, geometry=Geometry.of(bench.spec))
    plans = {"dense": plan_of("dense", keep=1.0)}
    for keep in KEEPS:
        for method in methods:
            with contextlib.suppress(InputError):
                plans[f"{method} {keep:.3f}"] = plan_of(method, keep=keep)
    ready = {
        name: {part: captured(call, bench.device) for part, call in bench.calls(plan).items()}
        for name, plan in plans.items()
    }
    calls = {(name, part): call for name, parts in ready.items() for part, (call, _) in parts.items()}
    times = in_turns(calls, Clock(bench.device), runs)
    return [
        Side(
            name=name,
            mean_visual_tokens=plan.mean_visual_tokens,
            vision=times[name, "vision"],
            prefill=times[name, "prefill"],
            per_token=times[name, "per_token"],
            pruning=times.get((name, "pruning")),
            cache_bytes=bench.cache_bytes(plan),
            captured=ready[name]["prefill"][1],
        )
        for name, plan in plans.items()
    ]


def table(sides: list[Side]) -> str:
    """A Markdown table with a row per side and ratios against the first, which is dense."""
    dense = sides[0]
    lines = [
        "| | mean tokens | vision ms | prefill ms (saved) | first token ms (saved) | pruning ms (of prefill) | ms per token | KV MB |",
        "| --- " * 8 + "|",
    ]
    for side in sides:
        faster = f"{side.prefill:.2f} ({1 - side.prefill / dense.prefill:.0%})"
        first = f"{side.first_token:.2f} ({1 - side.first_token / dense.first_token:.0%})"
        share = "" if side.pruning is None else f"{side.pruning:.3f} ({side.pruning / side.prefill:.1%})"
        lines.append(
            f"| {side.name} | {side.mean_visual_tokens:.1f} | {side.vision:.2f} | {faster} | {first} | {share} | "
            f"{side.per_token:.2f} | {side.cache_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llava-1.5-7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=DEFAULT_METHODS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for method in arguments.methods:
        if method not in DEFAULT_METHODS:
            parser.error(f"no method {method!r} to measure; choose from {', '.join(DEFAULT_METHODS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU that PyTorch can use; give --device cpu to try the script at --geometry tiny")
    cuda = arguments.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    size = arguments.batch, arguments.text
    with torch.inference_mode():
        kernels = measure_kernels(geometry(arguments.geometry), *size, arguments.device, name, arguments.runs)
        print(kernel_table(kernels), end="\n\n")
        bench = Bench(arguments.geometry, arguments.device, *size)
        sides = measure(bench, arguments.methods, arguments.runs)
    print(table(sides))
    result = {
        "device": name,
        "torch": torch.__version__,
        "geometry": arguments.geometry,
        "batch": arguments.batch,
        "text_tokens": arguments.text,
        "runs": arguments.runs,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "pruning_by": "native kernels" if native.available("cuda") and cuda else "PyTorch",
        "kernels": [asdict(kernel) for kernel in kernels],
        "sides": [{**asdict(side), "first_token": side.first_token} for side in sides],
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
