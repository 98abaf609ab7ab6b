"""The self-check of a build: on the model itself if it fits into memory, else on a small model with the same graphs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vtexport.builder.engines import EngineSpec, Source, make_engines
from vtexport.bundle.folder import PROCESSOR_FOLDER
from vtexport.bundle.manifest import VerificationEntry
from vtexport.check.compare import SAMPLES, Checked, compare_engine
from vtexport.errors import NumericError, VerificationError, first_line
from vtexport.models import ModelSpec
from vtexport.options import option_fields, option_values
from vtexport.progress import Progress, Silent
from vtexport.pruning import PruningPlan
from vtexport.targets.base import ENGINE_FOLDER, Compiled, Target
from vtexport.targets.engine import Engine

if TYPE_CHECKING:
    import onnx


def check_engines(
    source: Source,
    engines: EngineSpec,
    target: Target,
    compiled: Compiled,
    folder: Path,
    progress: Progress,
) -> VerificationEntry:
    """Check what was compiled into `folder`; see `vtexport.check.compare` for what is compared.

    If the model does not fit into memory, or is in bf16 without a device that can run it, the check has two parts: the
    structure of the model's own files, and a run in fp32 of a small random model with the same plans and layers.

    Raises:
        VerificationError: an engine differs from the reference.
    """
    with _explained(engines.dtype):
        if not checks_in_full(source.spec, engines.dtype, target):
            progress.stage("check the structure of every graph")
            check_structure(folder)
            return _check_small(source, engines, target, progress)
        progress.stage("verify against transformers", SAMPLES * len(engines.plans))
        engine, ran = _verifiable(target, compiled, engines.plans, folder)
        scheme, batch = target.scheme(), min(SAMPLES, target.largest_batch or SAMPLES)
        model = Checked(source.folder, folder / PROCESSOR_FOLDER, source.spec, source.clip, scheme)
        compared = partial(compare_engine, model=model, plans=engines.plans, dtype=engines.dtype, batch=batch)
        found = compared(engine, ran, advance=progress.advance, vision_only=target.vision_only, selects=target.selects)
        if scheme is None or not scheme.rounds_activations:
            return found
        progress.stage("verify with activations in 8 bits", SAMPLES * len(engines.plans))
        rounding = target.open(folder, compiled, engines.plans, 0)
        rounded = compared(rounding, ran, advance=progress.advance, rounded=True)
        return msgspec.structs.replace(found, rounded_logit_error=rounded.max_logit_error)


@contextmanager
def _explained(dtype: str) -> Iterator[None]:
    """Say of numbers that are none what they come from: the weights are numbers, so it is their products that do not fit."""
    try:
        yield
    except NumericError as error:
        remedy = "please report this model" if dtype == "fp32" else "build with --dtype fp32"
        raise VerificationError(f"in {dtype}, {error.fault}; {remedy}") from error


def _check_small(source: Source, engines: EngineSpec, target: Target, progress: Progress) -> VerificationEntry:
    """Check a small random model with the same plans and layers, on ONNX Runtime."""
    from vtexport.models.shrink import shrink
    from vtexport.targets.onnxruntime.check import OnnxRuntimeCheck
    from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget

    progress.stage("make a small model of the same layers, and its engines")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        made_up = shrink(source.spec, source.processor, source.clip, place)
        small = Source(source.name, place, place, made_up.checkpoint, made_up.spec, made_up.clip)
        tried = replace(engines, dtype="fp32")
        # Weights get as many bits as on the target; fp8, for which ONNX Runtime has no kernel, leaves them as they are.
        bits = str(option_values(target).get("quantize", ""))
        known = option_fields(OnnxRuntimeTarget)["quantize"].choices
        quantize: Any = bits if bits in known else ""
        runtime = OnnxRuntimeCheck(quantize, target.cache_room)
        place = Path(scratch) / "bundle"
        place.mkdir()
        made = make_engines(small, tried, runtime, place, Silent())
        progress.stage("verify the small model against transformers", SAMPLES * len(engines.plans))
        model = Checked(small.folder, small.processor, small.spec, small.clip, runtime.scheme())
        ran = f"a random model of the same layers, {small.spec.decoder.hidden_size} wide, on {runtime.name}"
        return compare_engine(
            runtime.open_exact(place, made.compiled, tried.plans),
            ran,
            model,
            tried.plans,
            tried.dtype,
            progress.advance,
        )


def checks_in_full(spec: ModelSpec, dtype: str, target: Target) -> bool:
    """Whether this machine can run the model itself against its reference."""
    runs = dtype != "bf16" or target.can_run().works
    return runs and memory_needed(spec, dtype) <= available_memory()


def memory_needed(spec: ModelSpec, dtype: str) -> int:
    """Bytes that the full check needs: the reference in fp32, and the engines' weights twice, as runtimes pack them."""
    return spec.weight_bytes("fp32") + 2 * spec.weight_bytes(dtype)


def available_memory() -> int:
    """Bytes of memory that are free on this machine, or in the container that this process runs in."""
    free = []
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(1024 * int(line.split()[1]))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        free.append(int(text) - int(used.read_text(encoding="ascii")))
    return min(free)


def check_structure(folder: Path) -> None:
    """Check that every ONNX file of a bundle is valid, and that its weights lie inside the files that it points to.

    Raises:
        VerificationError: a graph is not valid, or points outside a file.
    """
    import onnx

    for path in sorted((folder / ENGINE_FOLDER).glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            _check_span(path, tensor)
        # Declared as inputs, because the checker refuses weight files with several hard links as a possible attack.
        for tensor in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        del model.graph.initializer[:]
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise VerificationError(
                f"{path.name} is not valid ONNX ({first_line(error)}); please report this model"
            ) from error


def _check_span(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise VerificationError unless the file that `tensor` points into holds as many bytes as its shape asks for."""
    import onnx
    import onnx_ir as ir

    at = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    start, length = int(at["offset"]), int(at["length"])
    wanted = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
    held = (path.parent / at["location"]).stat().st_size - start
    if not length == wanted <= held:
        raise VerificationError(
            f"{path.name} needs {wanted} bytes of {tensor.name}, but {at['location']} has {min(length, held)} there; "
            "please report this model"
        )


def _verifiable(target: Target, compiled: Compiled, plans: Sequence[PruningPlan], folder: Path) -> tuple[Engine, str]:
    """The compiled engine and its name, or if it cannot run here, the ONNX files that it was compiled from."""
    if target.can_run().works:
        return target.open_exact(folder, compiled, plans), target.name
    from vtexport.targets.onnxruntime.check import OnnxRuntimeCheck

    sources = {name: f"{ENGINE_FOLDER}/{name}.onnx" for name in compiled.files}
    runtime = OnnxRuntimeCheck(room=target.cache_room)
    return runtime.open(folder, Compiled(sources, {}), plans, 0), f"the ONNX files of {target.name}, on onnxruntime"
