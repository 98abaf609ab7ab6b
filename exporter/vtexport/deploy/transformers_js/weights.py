"""ONNX files with their weights in the files beside them that transformers.js looks for."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

#: bytes of weights per file at most; a browser holds no more in one buffer
_MOST = 2**31 - 2**20
_ALIGNMENT = 64


def save(model: ir.Model, path: Path) -> int:
    """Write `model` to `path`, and its weights to `path` + "_data", then "_data_1", and so on.

    Returns:
        how many files of weights there are.
    """
    number, offset = 0, 0
    file = (path.parent / _name(path, number)).open("wb")
    try:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None, "a compiled graph has its weights"
            if offset and offset + tensor.nbytes > _MOST:
                file.close()
                number, offset = number + 1, 0
                file = (path.parent / _name(path, number)).open("wb")
            file.write(_bytes(tensor))
            value.const_value = ir.ExternalTensor(
                _name(path, number),
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=name,
                base_dir=path.parent,
            )
            padding = -tensor.nbytes % _ALIGNMENT
            file.write(bytes(padding))
            offset += tensor.nbytes + padding
    finally:
        file.close()
    ir.save(model, path)
    return number + 1


def _bytes(tensor: ir.TensorProtocol) -> bytes:
    """The tensor's values as the file has them. onnx_ir refuses files with hard links, which a bundle's may be."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.tobytes()
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        return file.read(tensor.nbytes)


def _name(path: Path, number: int) -> str:
    return f"{path.name}_data" + (f"_{number}" if number else "")
