"""Finds weights that are NaN or infinite, in a checkpoint's own bytes and before anything is compiled from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from vtexport.arrays import Array
from vtexport.errors import ModelError
from vtexport.models.checkpoint import TensorRecord

# safetensors dtype -> the type of its bits, and the least bits without a sign that are no finite number. All greater ones
# are none either, so that a tensor is judged by its maximum; integers are not listed.
_LEAST: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
# Bytes that are read and judged at a time: they stay in a core's own cache between the two.
_CHUNK = 1 << 20


def check_records(records: Iterable[TensorRecord], advance: Callable[[int], None]) -> None:
    """Read every tensor once, at about the speed of the disk.

    Args:
        records: tensors of a checkpoint.
        advance: called with the number of bytes read.

    Raises:
        ModelError: a number of a tensor is NaN or infinite, or its file ends inside it.
    """
    for record in records:
        if record.dtype not in _LEAST:
            advance(record.end - record.start)
            continue
        kind, least = _LEAST[record.dtype]
        for magnitude in _magnitudes(record, kind):
            if len(magnitude) and int(magnitude.max()) >= least:
                raise ModelError(_found(record))
            advance(magnitude.nbytes)


def check_arrays(arrays: dict[str, Array], where: object) -> None:
    """Check arrays that were computed from a configuration.

    Args:
        arrays: by their names.
        where: the model's folder, for the message.

    Raises:
        ModelError: a number is NaN or infinite.
    """
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ModelError(
                f"{where}: the table {name} that follows from config.json holds NaN or infinity; correct config.json"
            )


def _magnitudes(record: TensorRecord, kind: type[np.unsignedinteger[Any]]) -> Iterator[Array]:
    """The bits of a tensor's numbers without their signs, piece by piece, in an array that every piece overwrites."""
    size = np.dtype(kind).itemsize
    buffer, mask = np.empty(_CHUNK // size, kind), kind((1 << (8 * size - 1)) - 1)
    left = record.end - record.start
    with record.path.open("rb", buffering=0) as file:
        file.seek(record.start)
        while left:
            piece = buffer[: min(left, _CHUNK) // size]
            _fill(piece, file, record)
            yield np.bitwise_and(piece, mask, out=piece)
            left -= piece.nbytes


def _fill(piece: Array, file: Any, record: TensorRecord) -> None:
    """Read as many bytes as `piece` has."""
    view, got = memoryview(piece.data).cast("B"), 0
    while got < len(view):
        length = file.readinto(view[got:])
        if not length:
            raise ModelError(f"{record.path} ends inside tensor {record.name}; get the checkpoint again")
        got += length


def _found(record: TensorRecord) -> str:
    """The message about a tensor that holds such a number."""
    kind, least = _LEAST[record.dtype]
    number, first, before, nan = 0, 0, 0, True
    for magnitude in _magnitudes(record, kind):
        places = np.flatnonzero(magnitude >= least)
        if len(places) and not number:
            first = before + int(places[0])
            # The least of these numbers is infinity, which this one type does not have.
            nan = int(magnitude[places[0]]) > least or record.dtype == "F8_E4M3"
        number, before = number + len(places), before + len(magnitude)
    at = [int(index) for index in np.unravel_index(first, record.shape)]
    rest = "" if number == 1 else f", the first of {number} such numbers"
    return (
        f"{record.path}: tensor {record.name} holds {'NaN' if nan else 'infinity'} at {at}{rest}; the weights are damaged, "
        "get the checkpoint again"
    )
