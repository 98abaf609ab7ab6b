"""Weights by reference: graphs that point into one safetensors file, written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vtexport.errors import ModelError
from vtexport.models.checkpoint import Checkpoint, TensorRecord
from vtexport.models.llava import PREFIXES
from vtexport.targets.base import WEIGHTS_FILE

# ONNX type -> its safetensors name and NumPy type.
_TYPES: dict[ir.DataType, tuple[str, type[np.generic]]] = {
    ir.DataType.FLOAT: ("F32", np.float32),
    ir.DataType.FLOAT16: ("F16", np.float16),
    ir.DataType.INT32: ("I32", np.int32),
}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Slot:
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def write_weights(
    models: list[ir.Model],
    folder: Path,
    checkpoint: Checkpoint,
    computed: Mapping[str, Array],
    advance: Callable[[int], None],
) -> None:
    """Write the initialisers of `models` once into `folder`, and let every model point there.

    Values come from `checkpoint`, converted to the graph's dtype, or from `computed` (RoPE tables, constants of a
    method). One tensor at a time is in memory.

    Args:
        models: graphs that share initialisers by name; changed in place.
        folder: where `weights.safetensors`, and later the graphs, lie.
        checkpoint: source of the weights.
        computed: arrays by initialiser name.
        advance: called with the bytes written, for progress.

    Raises:
        ModelError: a tensor is missing, has another shape, or overflows fp16.
    """
    slots = _layout(models)
    path = folder / WEIGHTS_FILE
    with path.open("wb") as file:
        data_start = _write_header(file, slots)
        for slot in slots:
            known = computed.get(slot.name)
            array = _read(_source(checkpoint, slot.name)) if known is None else known
            file.write(_converted(array, slot, checkpoint.folder))
            advance(slot.length)
    by_name = {slot.name: slot for slot in slots}
    for model in models:
        for name, value in model.graph.initializers.items():
            slot = by_name[name]
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                data_start + slot.offset,
                slot.length,
                slot.dtype,
                shape=ir.Shape(slot.shape),
                name=name,
                base_dir=folder,
            )


def weights_size(models: list[ir.Model]) -> int:
    """Bytes that `write_weights` will write for `models`, the header not counted."""
    return sum(slot.length for slot in _layout(models))


def _layout(models: list[ir.Model]) -> list[_Slot]:
    wanted: dict[str, ir.Value] = {}
    for model in models:
        wanted.update(model.graph.initializers)
    slots, offset = [], 0
    for name, value in wanted.items():
        tensor = value.const_value
        assert tensor is not None, f"initialiser {name} without shape"
        shape = tuple(int(extent) for extent in tensor.shape.numpy())
        length = int(np.prod(shape, dtype=np.int64)) * np.dtype(_TYPES[tensor.dtype][1]).itemsize
        slots.append(_Slot(name, tensor.dtype, shape, offset, length))
        offset += length
    return slots


def _write_header(file: Any, slots: list[_Slot]) -> int:
    """The safetensors header; returns where the data begins."""
    header = {
        slot.name: {
            "dtype": _TYPES[slot.dtype][0],
            "shape": list(slot.shape),
            "data_offsets": [slot.offset, slot.offset + slot.length],
        }
        for slot in slots
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _source(checkpoint: Checkpoint, name: str) -> TensorRecord:
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            # A bundle's own weights carry our names: it can be built from again.
            return checkpoint.find((*theirs, ours), name.removeprefix(ours))
    raise AssertionError(f"no source for initialiser {name}")


def _read(record: TensorRecord) -> Any:
    from safetensors import safe_open

    with safe_open(record.path, framework="pt") as file:
        return file.get_tensor(record.name)


def _converted(value: Any, slot: _Slot, folder: Path) -> bytes:
    import torch

    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if tuple(tensor.shape) != slot.shape:
        raise ModelError(
            f"{folder}: tensor {slot.name} has shape {tuple(tensor.shape)} but config.json asks for {slot.shape}; "
            "the checkpoint and its config do not belong together"
        )
    kind = torch.from_numpy(np.empty(0, _TYPES[slot.dtype][1])).dtype
    converted = tensor.to(kind)
    if kind == torch.float16 and not torch.isfinite(converted).all():
        raise ModelError(f"{folder}: tensor {slot.name} does not fit into fp16; build with --dtype fp32")
    return converted.contiguous().numpy().tobytes()
