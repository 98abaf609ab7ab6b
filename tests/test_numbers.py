"""Numbers that are none: NaN and infinity are found where they arise, and named, instead of becoming an answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.errors import ModelError
from vtexport.graph.finite import check_arrays, check_records
from vtexport.models.checkpoint import Checkpoint

# Weights


def damaged(checkpoint: Path, folder: Path, ending: str, change: Callable[[torch.Tensor], Any]) -> tuple[Path, str]:
    """A copy of `checkpoint` in which `change` was done to the first tensor whose name ends so; and that name."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder, name


def put(value: float, *places: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
    """Put `value` at `places` of a tensor."""

    def change(tensor: torch.Tensor) -> None:
        for place in places:
            tensor[place] = value

    return change


@pytest.mark.parametrize(
    ("ending", "value", "dtype", "found"),
    [
        ("layers.1.mlp.down_proj.weight", float("nan"), "fp32", r"NaN at \[3, 5\]; the weights"),
        ("layers.0.self_attn.k_proj.weight", float("-inf"), "fp32", r"infinity at \[3, 5\]; the weights"),
        ("lm_head.weight", float("inf"), "fp16", r"infinity at \[3, 5\]; the weights"),
    ],
)
def test_a_weight_that_is_no_number_is_named_before_anything_is_compiled(
    tiny_checkpoint: Path, tmp_path: Path, ending: str, value: float, dtype: str, found: str
) -> None:
    folder, name = damaged(tiny_checkpoint, tmp_path / "model", ending, put(value, (3, 5)))
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} holds {found}"):
        build(BuildOptions(str(folder), 0.5, dtype=dtype), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_no_graph_reads_may_be_anything(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """CLIP's layers behind the one that LLaVA reads are in the checkpoint, and in no engine."""
    last = "encoder.layers.2.mlp.fc1.weight"
    folder, _ = damaged(tiny_checkpoint, tmp_path / "model", last, put(float("nan"), (0, 0)))
    build(BuildOptions(str(folder), 0.5, dtype="fp32"), tmp_path / "out")


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_is_judged_by_its_bits(kind: torch.dtype, tmp_path: Path) -> None:
    """The greatest and least numbers, subnormal ones and zeros of both signs are numbers; all else is found."""
    limits = torch.finfo(kind)
    numbers = torch.tensor([limits.max, limits.min, limits.smallest_normal / 4, -0.0, 0.0], dtype=torch.float64)
    # More than the piece that is read at a time, and not a multiple of it.
    tensor = numbers.to(kind).repeat(250_001)
    path = tmp_path / "some.safetensors"

    def check() -> int:
        save_file({"other": torch.full((3,), 2**31 - 1, dtype=torch.int32), "numbers": tensor}, path)
        read: list[int] = []
        check_records(Checkpoint.of_files(tmp_path, [path]).tensors.values(), read.append)
        return sum(read)

    assert check() == tensor.nbytes + 12
    places = [0, 600_000, len(tensor) - 1]
    for value in ("nan", "inf", "-inf"):
        if value != "nan" and kind == torch.float8_e4m3fn:
            continue  # a type without infinity
        for place in places:
            before = tensor[place].clone()
            tensor[place] = torch.tensor(float(value)).to(kind)
            word = "NaN" if value == "nan" else "infinity"
            with pytest.raises(
                ModelError, match=rf"tensor numbers holds {word} at \[{place}\]; the weights are damaged"
            ):
                check()
            tensor[place] = before
    tensor[places] = float("nan")
    with pytest.raises(ModelError, match=r"NaN at \[0\], the first of 3 such numbers"):
        check()


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"numbers": torch.ones(1000)}, path)
    records = Checkpoint.of_files(tmp_path, [path]).tensors.values()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(ModelError, match="ends inside tensor numbers"):
        check_records(records, lambda _bytes: None)


def test_tables_that_follow_from_the_configuration_are_checked() -> None:
    check_arrays({"rope.cos": np.ones(3, np.float32), "count": np.ones(3, np.int64)}, "model")
    with pytest.raises(ModelError, match=r"model: the table rope.cos that follows from config.json holds NaN"):
        check_arrays({"rope.cos": np.array([1, np.nan], np.float32)}, "model")
