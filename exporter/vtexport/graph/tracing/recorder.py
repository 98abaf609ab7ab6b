"""The recorder: stand-ins for tensors, and the graph that grows while a module computes with them.

A stand-in has a dtype and a shape, whose extents are numbers or `Extent`s, and no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vtexport.graph.domains import DOMAIN_VERSION, OPSET
from vtexport.graph.tracing.extent import STANDS_FOR, Extent
from vtexport.graph.weights import add_initialiser

_CPU = torch.device("cpu")
Shape = tuple[int, ...]
Conversion = TypeVar("Conversion", bound=Callable[..., Any])
#: name of a torch function or method -> its conversion, which is called with the recorder and the function's arguments
CONVERSIONS: dict[str, Callable[..., Any]] = {}

TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


class Kind(NamedTuple):
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: Shape


def converts(*names: str) -> Callable[[Conversion], Conversion]:
    """Register a function as the conversion of the torch functions called `names`."""

    def register(conversion: Conversion) -> Conversion:
        CONVERSIONS.update(dict.fromkeys(names, conversion))
        return conversion

    return register


class Traced:
    """Stands for a tensor: an ONNX value with a dtype and a shape. It has the methods and operators of a tensor."""

    #: torch's functions accept a stand-in only if it has this method; the recorder, being a mode, is asked first
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return NotImplemented

    def __init__(self, recorder: Recorder, value: ir.Value, kind: Kind) -> None:
        self.recorder, self.value = recorder, value
        self.dtype, self.shape = kind

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return _CPU

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(self.recorder.convert, name, self)

    def __bool__(self) -> bool:
        raise TypeError("what a graph does cannot depend on the values of tensors")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("the rows of a traced tensor cannot be iterated over")

    def __hash__(self) -> int:
        return id(self)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Traced, *others: Any) -> Any:
        return self.recorder.convert(name, self, *others)

    return apply


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "neg",
    "invert",
    "and",
    "or",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "getitem",
]:
    setattr(Traced, f"__{_name}__", _operator(f"__{_name}__"))


class Recorder(TorchFunctionMode):
    """Writes a graph down while it is the active mode.

    Args:
        name: of the graph.
        module: the module that is run; its parameters and buffers are the graph's initialisers, by their names.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET})
        self._named = {id(tensor): path for path, tensor in (*module.named_parameters(), *module.named_buffers())}
        #: an expanded value -> the stand-in that it was expanded from
        self.expanded: dict[ir.Value, Traced] = {}
        self._made: dict[object, tuple[Traced, ...]] = {}
        self._extents: dict[str, tuple[Traced, int]] = {}
        self._count: dict[str, int] = {}
        self._scope = [""]
        self._converting = False
        for scope, part in module.named_modules():
            part.register_forward_pre_hook(partial(self._enter, scope))
            part.register_forward_hook(self._leave)

    def _enter(self, scope: str, _module: nn.Module, _inputs: Any) -> None:
        self._scope.append(scope)

    def _leave(self, _module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        self._scope.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        # Not part of the graph: a conversion's questions to torch about dtypes, and a module's reads of attributes.
        if self._converting or name == "__get__":
            return func(*args, **kwargs or {})
        return self.convert(name, *args, **kwargs or {})

    def convert(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Write down a call of the torch function `name`.

        Raises:
            NotImplementedError: there is no conversion of it.
        """
        if name not in CONVERSIONS:
            raise NotImplementedError(f"vtexport.graph.tracing has no ONNX for torch's {name}")
        outermost, self._converting = not self._converting, True
        try:
            return CONVERSIONS[name](self, *args, **kwargs)
        finally:
            self._converting = not outermost

    def input(self, name: str, kind: Kind) -> Traced:
        """A new input of the graph; extents that first appear in it are read from it when the graph runs."""
        value = self._value(name, kind)
        self.graph.inputs.append(value)
        traced = Traced(self, value, kind)
        for axis, extent in enumerate(kind.shape):
            if isinstance(extent, Extent):
                self._extents.setdefault(str(extent), (traced, axis))
        return traced

    def output(self, name: str, tensor: Traced) -> None:
        """A new output of the graph."""
        value = tensor.value
        if value.producer() is None or value in self.graph.outputs:
            (tensor,) = self._append("Identity", [tensor], {}, [Kind(tensor.dtype, tensor.shape)], "")
            value = tensor.value
        value.name = name
        self.graph.outputs.append(value)

    def node(
        self,
        op_type: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: Sequence[Kind],
        domain: str = "",
    ) -> tuple[Traced, ...]:
        """The outputs, of kinds `like`, of a node; a node equal to an earlier one is not added again."""
        tensors, given = [self.tensor(tensor) for tensor in inputs], attributes or {}
        key = (domain, op_type, *(id(tensor.value) for tensor in tensors), repr(sorted(given.items())))
        if key not in self._made:
            self._made[key] = self._append(op_type, tensors, given, like, domain)
        return self._made[key]

    def _append(
        self, op_type: str, inputs: Sequence[Traced], attributes: Mapping[str, Any], like: Sequence[Kind], domain: str
    ) -> tuple[Traced, ...]:
        dynamic = [name for name, value in attributes.items() if isinstance(value, Extent)]
        if dynamic:
            raise NotImplementedError(
                f"attribute {dynamic[0]} of {op_type} cannot be the extent {attributes[dynamic[0]]}"
            )
        place = f"{self._scope[-1]}/{op_type}".removeprefix("/")
        number = self._count[place] = self._count.get(place, -1) + 1
        name = f"{place}_{number}" if number else place
        outputs = [
            self._value(f"{name}:{place}" if place else name, kind)  # names have to differ from those of nodes
            for place, kind in enumerate(like)
        ]
        node = ir.Node(
            domain,
            op_type,
            [tensor.value for tensor in inputs],
            ir.convenience.convert_attributes(attributes),
            outputs=outputs,
            name=name,
            version=DOMAIN_VERSION if domain else None,
        )
        if domain:
            self.graph.opset_imports[domain] = DOMAIN_VERSION
        self.graph.append(node)
        return tuple(Traced(self, value, kind) for value, kind in zip(outputs, like, strict=True))

    def tensor(self, source: Any, dtype: torch.dtype | None = None) -> Traced:
        """The stand-in for `source`: itself a stand-in, a parameter or buffer of the module, or a number of `dtype`."""
        if isinstance(source, Traced):
            return source
        if isinstance(source, torch.Tensor):
            return self._initialiser(source)
        return self.constant(np.asarray(source), dtype or torch.get_default_dtype())

    def constant(self, values: Any, dtype: torch.dtype = torch.int64) -> Traced:
        """A constant of `dtype` with the values of a NumPy array or of nested lists."""
        array = np.asarray(values)
        if array.dtype.kind == "i" and array.size and array.max() == STANDS_FOR:
            raise NotImplementedError("an extent is read when the graph runs, and is no constant")
        key = ("constant", array.shape, array.dtype.str, array.tobytes(), dtype)
        if key not in self._made:
            tensor = ir.tensor(array.astype(TYPES[dtype].numpy()), dtype=TYPES[dtype])
            self._made[key] = self._append("Constant", [], {"value": tensor}, [Kind(dtype, array.shape)], "")
        return self._made[key][0]

    def extents(self, sizes: Sequence[int]) -> Traced:
        """The extents `sizes` as a vector int64 [len(sizes)]."""
        if not any(isinstance(size, Extent) for size in sizes):
            return self.constant(np.array([*sizes], dtype=np.int64))
        parts = [self._extent(size) if isinstance(size, Extent) else self.constant([size]) for size in sizes]
        if len(parts) == 1:
            return parts[0]
        return self.node("Concat", parts, {"axis": 0}, like=[Kind(torch.int64, (len(parts),))])[0]

    def scalar(self, size: int) -> Traced:
        """The extent `size` as int64 []."""
        if not isinstance(size, Extent):
            return self.constant(size)
        return self.node("Squeeze", [self._extent(size)], like=[Kind(torch.int64, ())])[0]

    def vector(self, length: int) -> Traced:
        """A vector int32 [length] of values that nothing reads: an input of the graph if it has one, else zeros."""
        if not isinstance(length, Extent):
            return self.constant(np.zeros(length), torch.int32)
        known = self._extents.get(str(length))
        if known is not None and known[0].shape == (length,):
            return known[0]
        inputs, like = [self.constant(0, torch.int32), self.extents([length])], [Kind(torch.int32, (length,))]
        return self.node("Expand", inputs, like=like)[0]

    def _extent(self, size: Extent) -> Traced:
        """The extent `size` as int64 [1]."""
        vector = Kind(torch.int64, (1,))
        known = self._extents.get(str(size))
        if known is not None:
            source, axis = known
            return self.node("Shape", [source], {"start": axis, "end": axis + 1}, like=[vector])[0]
        total: Traced | None = None
        for name, number in size.terms.items():
            term = self._extent(Extent.named(name))
            if number != 1:
                (term,) = self.node("Mul", [term, self.constant([number])], like=[vector])
            total = term if total is None else self.node("Add", [total, term], like=[vector])[0]
        assert total is not None, "an extent has a term"
        return self.node("Add", [total, self.constant([size.constant])], like=[vector])[0] if size.constant else total

    def _initialiser(self, source: torch.Tensor) -> Traced:
        name = self._named.get(id(source))
        if name is None:
            raise NotImplementedError("a traced module computes with its own parameters and buffers only")
        key = ("initialiser", name)
        if key not in self._made:
            kind = Kind(source.dtype, tuple(source.shape))
            value = self._value(name, kind)
            add_initialiser(self.graph, value)
            self._made[key] = (Traced(self, value, kind),)
        return self._made[key][0]

    def _value(self, name: str, kind: Kind) -> ir.Value:
        shape = ir.Shape([str(extent) if isinstance(extent, Extent) else extent for extent in kind.shape])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(TYPES[kind.dtype]))
