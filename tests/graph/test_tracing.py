"""The tracer: a graph computes what the torch functions that it was recorded from compute, whatever the extents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vtexport.graph.tracing import Extent, Kind, Recorder
from vtexport.graph.tracing.recorder import CONVERSIONS

BATCH, ROWS = Extent.named("batch"), Extent.named("rows")


class Function(nn.Module):
    """A function as a module, with a weight and a buffer to compute with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4), requires_grad=False)
        self.register_buffer("table", torch.arange(10.0) ** 2)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def record(module: nn.Module, kinds: dict[str, Kind]) -> ir.Model:
    """The graph of a module; its outputs are called out0, out1, …"""
    recorder = Recorder("graph", module)
    inputs = [recorder.input(name, kind) for name, kind in kinds.items()]
    with recorder:
        outputs = module(*inputs)
    for number, tensor in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
        recorder.output(f"out{number}", tensor)
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in recorder.graph.initializers.items():
        value.const_value = ir.tensor(values[name].numpy(), name=name)
    model = ir.Model(recorder.graph, ir_version=10)
    onnx.checker.check_model(ir.to_proto(model))
    return model


def dynamic(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whose first extent is the batch and whose second, if it is 5, the rows."""
    return tuple(BATCH if axis == 0 else ROWS if axis == 1 and size == 5 else size for axis, size in enumerate(shape))


def check(function: Callable[..., Any], *inputs: Tensor) -> ir.Model:
    """Hold the graph of `function` to it, for these inputs and for some of another batch and other rows."""
    module = Function(function).eval()
    names = [f"in{number}" for number in range(len(inputs))]
    kinds = {name: Kind(x.dtype, dynamic(tuple(x.shape))) for name, x in zip(names, inputs, strict=True)}
    model = record(module, kinds)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    longer = tuple(x.repeat(2, *(2 if size == 5 else 1 for size in x.shape[1:2]), *(1,) * (x.ndim - 2)) for x in inputs)
    for given_inputs in (inputs, longer):
        wanted = module(*given_inputs)
        got = session.run(None, {name: x.numpy() for name, x in zip(names, given_inputs, strict=True)})
        for one, other in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert one.dtype == other.numpy().dtype
            assert one.shape == tuple(other.shape)
            np.testing.assert_allclose(one, other.numpy(), rtol=2e-6, atol=2e-6)
    return model


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def places(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


#: a tensor that is no module's
STRANGE = torch.ones(4)
X, Y, I = numbers(2, 5, 4), numbers(2, 5, 4) + 2.5, places(2, 5, below=4)  # noqa: E741 - an index
CASES: dict[str, tuple[Any, ...]] = {
    "arithmetic": (lambda m, x, y: (x + y - 3 * x / y, 1 - x, 2 / y, -x, x**2, x.square(), y.sqrt(), y.log(), x.exp()), X, Y),
    "integers": (lambda m, i: (i + 1, i // 3, (i - 7) // 3, i % 3, (i - 7) % 3, i / 2, i * 0.5, 3 - i), I),
    "promotion": (lambda m, x, i: (x + i, x * (i > 1), (i > 1) * 2, i.to(torch.int32) + i), numbers(2, 5), I),
    "bounds": (lambda m, x, y: (x.clamp(min=0), x.clamp(-0.5, 0.5), torch.minimum(x, y), torch.maximum(x, y)), X, Y),
    "integer bounds": (lambda m, i: (i.clamp(min=2), i.clamp(max=1), i.minimum(i.sum(dim=1, keepdim=True) - 3)), I),
    "comparison": (lambda m, x, i: (x > 0, x <= 0.5, i == 2, i != 2, i >= 1, x < i, ~(x > 0)), numbers(2, 5), I),
    "logic": (lambda m, i: ((i > 0) & (i < 3), (i == 0) | (i == 3), torch.where(i > 1, i > 2, i < 1)), I),
    "where": (lambda m, x, y: (torch.where(x > 0, x, y), torch.where(x > 0, -3.0, y), x.masked_fill(x > 0, -torch.inf)), X, Y),
    "not a number": (lambda m, x: x.log().nan_to_num(0.0), X),
    "matrix products": (lambda m, x, y: (x @ y.transpose(1, 2), x @ m.weight.transpose(0, 1), m.weight @ x.transpose(1, 2)), X, Y),
    "reductions": (lambda m, x: (x.sum(dim=1), x.mean(dim=(0, 2)), x.amax(dim=-1, keepdim=True), torch.amin(x, dim=1)), X),
    "counts": (lambda m, i: ((i > 1).sum(dim=1), i.sum(dim=1, keepdim=True), (i > 1).float().sum(dim=1)), I),
    "running sums": (lambda m, x, i: (x.cumsum(dim=1), (i > 1).cumsum(dim=1)), X, I),
    "largest": (lambda m, x: (*torch.topk(x, 3, dim=2), x.topk(2, dim=2, largest=False).values), X),
    "gather": (lambda m, x, i: (x.gather(2, i[..., None]), x[..., 0].gather(1, i), i.gather(1, i)), X, I),
    "whole rows": (lambda m, x, i: x.gather(1, i[..., None].expand(-1, -1, 4)), X, places(2, 3, below=5)),
    "scatter": (lambda m, x, i: torch.zeros_like(x).scatter(1, i, torch.ones_like(i, dtype=torch.float32)), numbers(2, 6), I),
    "rows of a table": (lambda m, i: (m.table[i], F.embedding(i % 3, m.weight), m.table.index_select(0, i[0])), I),
    "parts": (lambda m, x: (x[:, 0], x[:, -1], x[:, :, 1], x[..., 1:3], x[:, :, ::2], x[:, None], x[:, :2], x[:, -2:], x[:, 1:]), X),
    "empty parts": (lambda m, x, y: torch.cat([x[:, :, :0], y], dim=2), X, Y),
    "shapes": (lambda m, x: (x.flatten(1), x[:, 0].flatten(), x.unflatten(2, (2, 2)), x.unflatten(2, (-1, 2)), x.unsqueeze(-1)), X),
    "reshape": (lambda m, x: (x.reshape(x.shape[0], x.shape[1], 2, 2), x[:, 0].reshape(-1, 2), x.reshape(x.shape[0], -1)), X),
    "split batch": (lambda m, x: (x.flatten(0, 1), x.flatten(0, 1).unflatten(0, (-1, 3))), numbers(2, 3, 4)),
    "expand": (lambda m, x: (x[:, :1].expand(-1, 3, -1), m.table.expand(x.shape[0], x.shape[1], -1)), X),
    "repeat": (lambda m, x: x[:, 0].repeat_interleave(3, dim=0), X),
    "together": (lambda m, x, y: (torch.cat([x, y], dim=1), torch.stack([x, y], dim=1), *x.chunk(2, dim=-1)), X, Y),
    "new tensors": (
        lambda m, x: (
            torch.arange(x.shape[1]) + torch.zeros(x.shape[0], x.shape[1], dtype=torch.int64),
            torch.arange(x.shape[1], dtype=torch.int32) + torch.arange(x.shape[0], dtype=torch.int32)[:, None],
            torch.ones(x.shape[0], 1) + torch.arange(3),
            torch.full_like(x, 0.25),
            x.new_full((), torch.inf).expand(x.shape[0], 2),
            x.shape[1] + torch.arange(2), x.shape[1] - torch.arange(2) * x.shape[0],
        ),
        X,
    ),
    "dtypes": (lambda m, x: (x.to(torch.int64), x.to(torch.float16).float(), (x > 0).long(), m.table.to(torch.int32)), X),
    "layers": (
        lambda m, x: (
            F.linear(x, m.weight), F.linear(x, m.weight, m.table[:3]),
            F.layer_norm(x, (4,), m.weight[0], m.weight[1], 1e-5), torch.softmax(x, dim=-1), F.softmax(x, dim=1),
        ),
        X,
    ),
    "convolution": (lambda m, x: F.conv2d(x, m.weight.reshape(1, 3, 2, 2), None, (2, 2), (0, 0), (1, 1), 1), numbers(2, 3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_graph_computes_what_torch_computes(name: str) -> None:
    function, *inputs = CASES[name]
    check(function, *inputs)


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "tanh", "sigmoid"]
)
def test_activations(name: str) -> None:
    check(lambda m, x: ACT2FN[name](x), 3 * X)


def test_every_conversion_is_tried() -> None:
    """By the cases above, but for vtexport's own ops, which have tests of their own."""
    used: set[str] = set()
    before = Recorder.convert

    def convert(self: Recorder, name: str, *args: Any, **kwargs: Any) -> Any:
        used.add(CONVERSIONS[name].__name__)
        return before(self, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "convert", convert)
        for function, *inputs in CASES.values():
            record(Function(function), {f"in{n}": Kind(x.dtype, tuple(x.shape)) for n, x in enumerate(inputs)})
        for name in ("gelu", "gelu_new", "quick_gelu", "silu", "relu"):
            record(Function(lambda m, x, name=name: ACT2FN[name](x)), {"in0": Kind(X.dtype, tuple(X.shape))})
    own = {function.__name__ for function in CONVERSIONS.values() if function.__module__.endswith("own_ops")}
    assert {function.__name__ for function in CONVERSIONS.values()} - own - used == set()


def test_rows_are_gathered_without_an_index_as_wide() -> None:
    function, *inputs = CASES["whole rows"]
    assert "GatherND" in {node.op_type for node in check(function, *inputs).graph}


def test_nodes_that_are_alike_are_one() -> None:
    model = check(lambda m, x: (F.linear(x, m.weight) + F.linear(x, m.weight), x.sum(dim=1), x.sum(dim=1)), X)
    kinds = [node.op_type for node in model.graph]
    assert [kinds.count(kind) for kind in ("Transpose", "MatMul", "ReduceSum", "Identity")] == [1, 1, 1, 1]


def test_an_input_may_be_an_output() -> None:
    check(lambda m, x: (x, x[:, None]), X)


def test_nodes_are_called_after_their_layers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU()))
    names = [node.name for node in record(module.requires_grad_(False), {"x": Kind(torch.float32, (BATCH, 4))}).graph]
    assert "0/MatMul" in names
    assert "1.0/MatMul" in names
    assert "1.1/Sigmoid" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m, x: torch.linalg.inv(x), NotImplementedError, "has no ONNX for torch's linalg_inv"),
        (lambda m, x: x if x.sum(dim=1) > 0 else -x, TypeError, "cannot depend on the values of tensors"),
        (lambda m, x: list(x), TypeError, "cannot be iterated"),
        (lambda m, x: x.flatten(0, 1), TypeError, "is no sum"),
        (lambda m, x: x + STRANGE, NotImplementedError, "its own parameters"),
        (lambda m, x: x if x.shape[0] > 1 else -x, TypeError, "the extent batch is dynamic and supports only sums"),
        (lambda m, x: x.reshape(x.shape[0] // 2, -1), TypeError, "not always a multiple of 2"),
        (lambda m, x: x + torch.ones(x.shape[0], 3, 4), ValueError, "do not broadcast"),
        (lambda m, x: x[:, 1:-1], NotImplementedError, "of rows elements"),
        (lambda m, x: x[:, :-1], NotImplementedError, "of rows elements"),
        (lambda m, x: x[:, :, : x.shape[1]], NotImplementedError, "of 4 elements"),
        (lambda m, x: x.recorder.constant([x.shape[1]]), NotImplementedError, "an extent is read when the graph runs"),
        (
            lambda m, x: x.recorder.node("Cast", [x], {"to": x.shape[1]}, like=[]),
            NotImplementedError,
            "attribute to of Cast cannot be the extent rows",
        ),
    ],
)
def test_what_cannot_be_recorded_is_an_error(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        record(Function(function), {"x": Kind(torch.float32, (BATCH, ROWS, 4))})


sums = st.builds(lambda batch, rows, constant: (batch, rows, constant), *(st.integers(-3, 3) for _ in range(3)))


@given(sums, sums, st.integers(-4, 4), st.integers(1, 9), st.integers(1, 9))
def test_extents_add_up(one: Any, other: Any, factor: int, batch: int, rows: int) -> None:
    """Arithmetic on extents is arithmetic on the numbers that they stand for."""

    def made(parts: tuple[int, int, int]) -> int:
        return parts[0] * BATCH + parts[1] * ROWS + parts[2]

    def value(extent: int) -> int:
        if not isinstance(extent, Extent):
            return extent
        return extent.constant + sum({"batch": batch, "rows": rows}[name] * n for name, n in extent.terms.items())

    a, b = made(one), made(other)
    assert value(a + b) == value(a) + value(b)
    assert value(a - b) == value(a) - value(b)
    assert value(a * factor) == value(factor * a) == value(a) * factor
    assert value(3 - a) == 3 - value(a)
    assert a - a == 0
    if factor and isinstance(a, Extent):
        assert a * factor // a == factor
    assert (a == b) is (one == other)
    if factor > 0:
        assert value(a * factor // factor) == value(a)


def test_extents_say_what_they_are() -> None:
    assert str(ROWS + 144) == "rows + 144"
    assert str(2 * BATCH + ROWS) == "2*batch + rows"
    for question in (lambda: BATCH > 1, lambda: BATCH % 2, lambda: BATCH * ROWS, lambda: BATCH // ROWS):
        with pytest.raises(TypeError):
            question()
