"""The target `tensorrt-rtx`: TensorRT plans built ahead of time, on any machine, for RTX GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vtexport.errors import InputError
from vtexport.targets.base import WEIGHTS_FILE, Availability, Compiled, CompileJob, Engine, graph_folder, prefill_names

#: compute capabilities to compile for; TensorRT for RTX also knows 75, but has no fp32 matmul there, and scores
#: are fp32 on every target so that every target keeps the same tokens
ARCHITECTURES = (80, 86, 89, 120, 121)


class TensorRTRTXTarget:
    """TensorRT for RTX: one plan a graph, weights inside, profiles over batch, text and cache length."""

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT for RTX: built without a GPU, runs on RTX GPUs"
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    options: ClassVar[Mapping[str, str | int]] = {"sm": "86,89,120", "max_batch": 4, "max_text": 512}

    def can_build(self) -> Availability:
        for module in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
            if importlib.util.find_spec(module) is None:
                return Availability(
                    False,
                    "TensorRT for RTX is not installed; install it with: pip install 'vtexport[tensorrt-rtx]'",
                )
        from importlib.metadata import version

        return Availability(True, f"TensorRT for RTX {version('tensorrt-rtx-cu13-bindings')}")

    def can_run(self) -> Availability:
        available = self.can_build()
        if not available.works:
            return available
        import torch

        if not torch.cuda.is_available():
            return Availability(
                False, "no CUDA GPU that PyTorch can use; run on a machine with an RTX GPU and a CUDA build of torch"
            )
        return Availability(True, f"{available.reason} on {torch.cuda.get_device_name()}")

    def check_options(self, options: Mapping[str, str | int]) -> None:
        parse_architectures(str(options["sm"]))
        for name in ("max_batch", "max_text"):
            if int(options[name]) < 1:
                raise InputError(f"--{name.replace('_', '-')} {options[name]} is too small; give at least 1")

    def compile(self, job: CompileJob) -> Compiled:
        import onnx_ir as ir
        from onnx_ir.passes.common import InlinePass

        from vtexport.targets.tensorrt import builder

        files = {}
        for name, model in job.models.items():
            source = job.folder / graph_folder(name) / f"{name}.onnx"
            # Inlined here, function bodies get node names that are their own; the parser would repeat them.
            InlinePass()(model)
            ir.save(model, source)
            files[name] = f"{graph_folder(name)}/{name}.plan"
            plan = builder.build_plan(
                source,
                builder.Build(
                    name=name,
                    architectures=parse_architectures(str(job.options["sm"])),
                    shapes=_profile(job, name),
                    report=job.report,
                    advance=job.advance,
                    warn=job.warn,
                ),
            )
            (job.folder / files[name]).write_bytes(plan)
        facts: dict[str, str | int] = {"sm": str(job.options["sm"])}
        return Compiled(files, {"tensorrt-rtx": builder.version()}, facts)

    def finish(self, folder: Path) -> None:
        for place in {folder / graph_folder(name) for name in ("vision", "decode")}:
            for source in [*place.glob("*.onnx"), place / WEIGHTS_FILE]:
                source.unlink(missing_ok=True)

    def open(self, folder: Path, files: Mapping[str, str], threads: int) -> Engine:
        from vtexport.targets.tensorrt.engine import TensorRTEngine

        return TensorRTEngine({name: folder / file for name, file in files.items()})


def parse_architectures(text: str) -> tuple[int, ...]:
    """`"86,89"` -> (86, 89).

    Raises:
        InputError: not a list of known compute capabilities.
    """
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--sm {text!r} is not a list of numbers; write --sm 86,89,120") from error
    for number in found:
        if number not in ARCHITECTURES:
            known = ", ".join(map(str, ARCHITECTURES))
            raise InputError(f"--sm {number} is not supported by target tensorrt-rtx; choose from {known}")
    return found


def _profile(job: CompileJob, name: str) -> dict[str, tuple[Any, Any, Any]]:
    """Smallest, usual and largest shape of every input of graph `name`."""
    names = {value.name for value in job.models[name].graph.inputs}
    batch, text = int(job.options["max_batch"]), int(job.options["max_text"])
    d, v = job.spec.decoder, job.spec.vision
    usual_text = min(48, text)

    def shapes(*axes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        low, usual, high = zip(*axes, strict=True)
        return low, usual, high

    def fixed(extent: int) -> tuple[int, int, int]:
        return extent, extent, extent

    rows = (1, 1, batch)
    if name == "vision":
        size = fixed(v.image_size)
        inputs = {"pixel_values": shapes(rows, fixed(v.channels), size, size)}
        if "question_ids" in names and job.spec.clip is not None:
            inputs["question_ids"] = shapes(rows, fixed(job.spec.clip.length))
        return inputs
    if name != "decode":
        plan = job.plans[prefill_names(len(job.plans)).index(name)]
        inputs = {
            "input_ids": shapes(rows, (1, usual_text, text)),
            "image_position": shapes(rows),
            "text_length": shapes(rows),
            "visual": shapes(rows, fixed(plan.vision_tokens), fixed(d.hidden_size)),
        }
        if "ranking" in names:
            inputs["ranking"] = shapes(rows, fixed(plan.vision_tokens))
        return inputs
    from vtexport.graph.graphs import cache_names

    layers = fixed(d.num_layers)
    inputs = {"input_ids": shapes(rows, fixed(1)), "length": shapes(layers, rows), "position": shapes(layers, rows)}
    if "image_position" in names:
        inputs["image_position"] = shapes(rows)
    for number, cache in enumerate(cache_names("past", d.num_layers)):
        visual = max(plan.per_layer[number // 2] for plan in job.plans)
        room = min(visual + text, d.max_positions)
        usual = min(visual + min(128, text), room)
        inputs[cache] = shapes(rows, fixed(d.num_kv_heads), (1, usual, room), fixed(d.head_size))
    return inputs
