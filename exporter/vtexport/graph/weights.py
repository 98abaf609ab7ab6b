"""Weights by reference: graphs point into safetensors files, the checkpoint's own if its bytes serve unchanged."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from vtexport.arrays import Array
from vtexport.errors import ModelError
from vtexport.graph.finite import check_arrays, check_records
from vtexport.models.checkpoint import Checkpoint, TensorRecord
from vtexport.models.needed import check_shape, find

#: the file of weights that had to be computed or converted; the others stay in the checkpoint's files
WEIGHTS_FILE = "weights.safetensors"
# ONNX type -> its safetensors name and NumPy type.
_TYPES: dict[ir.DataType, tuple[str, type[np.generic]]] = {
    ir.DataType.FLOAT: ("F32", np.float32),
    ir.DataType.FLOAT16: ("F16", np.float16),
    # NumPy has no bf16, so this is the type of its bits.
    ir.DataType.BFLOAT16: ("BF16", np.uint16),
    ir.DataType.INT32: ("I32", np.int32),
    ir.DataType.INT8: ("I8", np.int8),
    ir.DataType.UINT8: ("U8", np.uint8),
    ir.DataType.FLOAT8E4M3FN: ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    # Two numbers in a byte, for which safetensors has no type.
    ir.DataType.INT4: ("U8", np.uint8),
}
# A checkpoint's file is linked if a bundle needs at least this share of it; otherwise only the needed part is copied.
_WORTH_LINKING = 0.5


def add_initialiser(graph: ir.Graph, value: ir.Value) -> None:
    """Make `value` an initialiser of `graph`, whose data `Weights.write` will put into a file."""
    assert value.dtype is not None, "initialisers have a type"
    assert value.shape is not None, "and a shape"
    value.const_value = ir.LazyTensor(_never, dtype=value.dtype, shape=value.shape, name=value.name)
    graph.register_initializer(value)


def _never() -> Any:
    raise AssertionError("a traced weight has no values before it is written")


@dataclass(frozen=True)
class Lazy:
    """An initialiser that is made from another tensor when it is written.

    Attributes:
        source: the name of that tensor as an initialiser of a graph.
        dtype: the type that this tensor is first converted to.
        make: makes the array from the converted tensor.
    """

    source: str
    dtype: ir.DataType
    make: Callable[[Array], Array]


@dataclass(frozen=True)
class _Made:
    """A `Lazy` whose source was found."""

    record: TensorRecord
    lazy: Lazy


@dataclass(frozen=True)
class _Slot:
    """An initialiser: its name, type and shape in the graph, and where its values come from."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    source: TensorRecord | Array | _Made

    @property
    def length(self) -> int:
        return int(np.prod(self.stored, dtype=np.int64)) * np.dtype(_TYPES[self.dtype][1]).itemsize

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of its values in a file."""
        return (-(-int(np.prod(self.shape)) // 2),) if self.dtype == ir.DataType.INT4 else self.shape

    @property
    def record(self) -> TensorRecord | None:
        """The checkpoint's tensor, if its very bytes are what the graph wants."""
        source = self.source
        return source if isinstance(source, TensorRecord) and source.dtype == _TYPES[self.dtype][0] else None


class Weights:
    """The initialisers of several graphs that share them by name.

    Args:
        models: the graphs.
        checkpoint: source of the weights.
        computed: arrays by initialiser name: RoPE tables, constants of a method; or how to make them from weights.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """

    def __init__(
        self, models: Sequence[ir.Model], checkpoint: Checkpoint, computed: Mapping[str, Array | Lazy]
    ) -> None:
        self._models, self._folder = models, checkpoint.folder
        wanted: dict[str, ir.Value] = {}
        for model in models:
            wanted.update(model.graph.initializers)
        self._slots = [self._slot(name, value, checkpoint, computed) for name, value in wanted.items()]
        self._linked = _worth_linking(self._slots)
        self._last: tuple[TensorRecord, Array] | None = None

    def _reference(self, slot: _Slot) -> TensorRecord | None:
        """The checkpoint's tensor that `slot` points at, if it does."""
        record = slot.record
        return record if record is not None and record.path in self._linked else None

    def _slot(self, name: str, value: ir.Value, checkpoint: Checkpoint, computed: Mapping[str, Array | Lazy]) -> _Slot:
        tensor = value.const_value
        assert tensor is not None, f"initialiser {name} without shape"
        shape = tuple(int(extent) for extent in tensor.shape.numpy())
        # If the checkpoint is itself a bundle, it already holds the computed arrays.
        known = name in computed and name not in checkpoint.tensors
        source = computed[name] if known else find(checkpoint, name)
        if isinstance(source, Lazy):
            return _Slot(name, tensor.dtype, shape, _Made(find(checkpoint, source.source), source))
        check_shape(checkpoint.folder, name, source.shape, shape)
        return _Slot(name, tensor.dtype, shape, source)

    def _read(self) -> list[TensorRecord]:
        """The checkpoint's tensors that any graph needs, each once, as they lie in their files."""
        sources = [slot.source.record if isinstance(slot.source, _Made) else slot.source for slot in self._slots]
        records = {source for source in sources if isinstance(source, TensorRecord)}
        return sorted(records, key=lambda record: (record.path, record.start))

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that `check` reads."""
        return sum(record.end - record.start for record in self._read())

    @property
    def bytes_written(self) -> int:
        """Bytes that `write` puts into a file of their own."""
        return sum(slot.length for slot in self._slots if self._reference(slot) is None)

    @property
    def bytes_referenced(self) -> int:
        """Bytes that stay as the checkpoint has them."""
        return sum(slot.length for slot in self._slots if self._reference(slot) is not None)

    def check(self, advance: Callable[[int], None]) -> None:
        """Refuse weights that are NaN or infinite; those that no graph needs are not read.

        Args:
            advance: called with the number of bytes read.

        Raises:
            ModelError: a weight is no number.
        """
        check_records(self._read(), advance)
        arrays = {slot.name: slot.source for slot in self._slots if isinstance(slot.source, np.ndarray)}
        check_arrays(arrays, self._folder)

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Put the weights into `folder`, and let every graph, which will lie there too, point at them.

        Files of the checkpoint that hold a tensor as a graph wants it are hard-linked, or copied from another file
        system. Other tensors are converted one by one, with at most one in memory.

        Args:
            folder: where graphs and weights lie.
            advance: called with the number of bytes written.

        Raises:
            ModelError: a tensor overflows fp16.
        """
        places: dict[str, tuple[str, int]] = {}
        linked: dict[Path, str] = {}
        written = [slot for slot in self._slots if self._reference(slot) is None]
        reserved = {WEIGHTS_FILE} if written else set()
        for slot in self._slots:
            record = self._reference(slot)
            if record is not None:
                if record.path not in linked:
                    linked[record.path] = _link(record.path, folder, reserved)
                places[slot.name] = linked[record.path], record.start
        if written:
            with (folder / WEIGHTS_FILE).open("wb") as file:
                offset = _write_header(file, written)
                for slot in written:
                    file.write(self._bytes(slot))
                    places[slot.name] = WEIGHTS_FILE, offset
                    offset += slot.length
                    advance(slot.length)
        by_name = {slot.name: slot for slot in self._slots}
        for model in self._models:
            for name, value in model.graph.initializers.items():
                slot, (file_name, offset) = by_name[name], places[name]
                value.const_value = ir.ExternalTensor(
                    file_name,
                    offset,
                    slot.length,
                    slot.dtype,
                    shape=ir.Shape(slot.shape),
                    name=name,
                    base_dir=folder,
                )

    def _bytes(self, slot: _Slot) -> bytes:
        """The values of `slot` as the file has them."""
        source = slot.source
        if not isinstance(source, _Made):
            values = _converted(source, slot.dtype, slot.name, self._folder)
        else:
            # Tensors that are made from one weight follow each other.
            if self._last is None or self._last[0] != source.record:
                converted = _converted(source.record, source.lazy.dtype, source.lazy.source, self._folder)
                if source.lazy.dtype == ir.DataType.BFLOAT16:
                    converted = converted.view(ml_dtypes.bfloat16)
                self._last = source.record, converted
            values = source.lazy.make(self._last[1])
            assert values.shape == slot.stored, f"{slot.name} was made in another shape than its graph says"
            if values.dtype == ml_dtypes.bfloat16:
                values = values.view(np.uint16)
        return values.astype(_TYPES[slot.dtype][1], copy=False).tobytes()


def _worth_linking(slots: Sequence[_Slot]) -> set[Path]:
    """The checkpoint's files of which enough is needed unchanged."""
    needed: dict[Path, int] = {}
    for slot in slots:
        if slot.record is not None:
            needed[slot.record.path] = needed.get(slot.record.path, 0) + slot.length
    return {path for path, length in needed.items() if length >= _WORTH_LINKING * path.stat().st_size}


def _link(path: Path, folder: Path, reserved: set[str]) -> str:
    """Link `path` into `folder` and return its name there; symbolic links of a hub's cache are followed."""
    taken = reserved | {file.name for file in folder.iterdir()}
    name, number = path.name, 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    try:
        os.link(path.resolve(), folder / name)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, folder / name)
    return name


def _write_header(file: Any, slots: Sequence[_Slot]) -> int:
    """The safetensors header; returns where the data begins."""
    header, offset = {}, 0
    for slot in slots:
        span = [offset, offset + slot.length]
        header[slot.name] = {"dtype": _TYPES[slot.dtype][0], "shape": list(slot.stored), "data_offsets": span}
        offset += slot.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _converted(source: TensorRecord | Array, dtype: ir.DataType, name: str, folder: Path) -> Array:
    """A tensor in the type that a graph wants.

    Raises:
        ModelError: it overflows fp16.
    """
    import torch
    from safetensors import safe_open

    if isinstance(source, TensorRecord):
        with safe_open(source.path, framework="pt") as file:
            tensor = file.get_tensor(source.name)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(source))
    bits = dtype == ir.DataType.BFLOAT16
    torch_dtype = torch.bfloat16 if bits else torch.from_numpy(np.empty(0, _TYPES[dtype][1])).dtype
    converted = tensor.to(torch_dtype).contiguous()
    if torch_dtype == torch.float16 and not torch.isfinite(converted).all():
        raise ModelError(
            f"{folder}: tensor {name} does not fit into fp16; build with --dtype fp32, or bf16 on a TensorRT target"
        )
    values: Array = (converted.view(torch.uint16) if bits else converted).numpy()
    return values
