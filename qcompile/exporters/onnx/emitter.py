"""What rules write with: nodes, constants and sizes of an ONNX graph that is being made from a `Graph`.

Sizes that are not known are int64 tensors [1]; the values of nodes are `onnx_ir` values, tuples of them where an operator has several
results, or what a rule leaves for the rules that read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, fx

from qcompile.errors import ExportError
from qcompile.ir.allowed import name_of
from qcompile.ir.graph import Graph
from qcompile.ir.verify import where

MICROSOFT = "com.microsoft"
PORTABLE, ORT = "portable", "ort"
PROFILES = (PORTABLE, ORT)
"""`portable` is standard operators only, `ort` takes those of onnxruntime where it is faster with them."""

DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.DOUBLE, torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16, torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8, torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64, torch.uint64: ir.DataType.UINT64, torch.bool: ir.DataType.BOOL,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN, torch.float8_e8m0fnu: ir.DataType.FLOAT8E8M0,
}  # fmt: skip
"""Of torch and of ONNX."""

Value = ir.Value
Call = Any
"""A call node (`fx.Node`): torch's own types of its arguments say nothing."""
Rule = Callable[["Emitter", Call], Any]
_END = (1 << 63) - 1
"""Beyond the end of any axis."""


@dataclass
class Emitter:
    """The graph as far as it has been written.

    Attributes:
        graph: what it is made from.
        opset: of the standard operators.
        profile: one of `PROFILES`.
        accuracy_level: of com.microsoft's MatMulNBits: 0 multiplies in the type of the activations, 4 in int8.
        nodes: in order.
        initializers: by name.
        results: node -> what stands for it.
    """

    graph: Graph
    opset: int
    profile: str = PORTABLE
    accuracy_level: int = 0
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, Value] = field(default_factory=dict)
    results: dict[fx.Node, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    """What rules make once and find again, by a key of their own."""
    current: fx.Node | None = None

    @property
    def is_ort(self) -> bool:
        """Whether operators of onnxruntime may be used."""
        return self.profile == ORT

    def op(self, operator: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """A node with one result."""
        return self.ops(operator, *inputs, domain=domain, count=1, **attributes)[0]

    def ops(self, operator: str, *inputs: Value | None, domain: str = "", count: int, **attributes: Any) -> tuple[Value, ...]:
        """A node with `count` results; inputs left out at the end, and attributes that are None, are not written."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        kept = {name: value for name, value in attributes.items() if value is not None}
        number = len(self.nodes)
        stem = self.current.name if self.current is not None else "shared"
        outputs = [ir.Value(name=f"{stem}.{operator}_{number}" + (f".{place}" if place else "")) for place in range(count)]
        node = ir.node(operator, given, kept, domain=domain, outputs=outputs, name=f"{stem}/{operator}_{number}")
        if self.current is not None and self.current.meta.get("source"):
            node.doc_string = str(self.current.meta["source"])
        self.nodes.append(node)
        return tuple(outputs)

    @contextlib.contextmanager
    def on_behalf_of_all(self) -> Iterator[None]:
        """Nodes that many others read belong to none of them."""
        node, self.current = self.current, None
        try:
            yield
        finally:
            self.current = node

    # Constants

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        """A small constant (a number, a list or a tensor); equal ones are one."""
        tensor = torch.as_tensor(value, dtype=dtype).detach().cpu().contiguous()
        key = ("constant", tensor.dtype, tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
        if key not in self.shared:
            self.shared[key] = self.initializer(f"constant_{len(self.initializers)}", tensor.dtype, tensor.shape, lambda: tensor)
        found: Value = self.shared[key]
        return found

    def ints(self, values: Sequence[int]) -> Value:
        """Int64 [n]."""
        return self.constant(list(values), torch.int64)

    def unsigned(self, values: Sequence[int], dtype: torch.dtype) -> Value:
        """Numbers that have no sign, [n]."""
        return self.constant(torch.tensor(list(values), dtype=dtype))

    def initializer(self, name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> Value:
        """A constant under `name` whose bytes are made when the file is written."""

        def load() -> ir.TensorProtocol:
            made = make().contiguous()
            if made.dtype != dtype or tuple(made.shape) != tuple(shape):
                raise AssertionError(f"{name}: expected {dtype} {tuple(shape)}, made {made.dtype} {tuple(made.shape)}")
            return TorchTensor(made, name=name)

        return self._keep(name, ir.LazyTensor(load, DTYPES[dtype], ir.Shape(shape), name=name))

    def packed(self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Tensor]) -> Value:
        """A constant of 4 bits a number; `make` gives the bytes, low nibbles first, of all its numbers in order."""

        def load() -> ir.TensorProtocol:
            return ir.PackedTensor(make().numpy(), dtype, shape=ir.Shape(shape), name=name)

        return self._keep(name, ir.LazyTensor(load, dtype, ir.Shape(shape), name=name))

    def _keep(self, name: str, tensor: ir.LazyTensor) -> Value:
        if name in self.initializers:
            raise AssertionError(f"initializer {name}: expected a name that is free")
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[name] = value
        return value

    def from_constant(
        self, node: fx.Node, form: str, dtype: torch.dtype, shape: Sequence[int], change: Callable[[Tensor], Tensor]
    ) -> Value:
        """What `change` makes of a constant of the graph; `form` names the change, made once."""
        name = str(node.target)
        key = ("changed", name, form)
        if key not in self.shared:
            source = self.graph.constants[name]
            self.shared[key] = self.initializer(f"{name}.{form}", dtype, shape, lambda: change(source.materialize()))
        found: Value = self.shared[key]
        return found

    # Values

    def value(self, item: Any, dtype: torch.dtype | None = None) -> Value:
        """The tensor of a node or a number, cast to `dtype` if that is given."""
        if not isinstance(item, fx.Node):
            return self.constant(item, dtype)
        if self.is_size(item):
            return self._converted(self.op("Squeeze", self.size(item), self.ints([0])), torch.int64, dtype)
        found = self._stored(item) if item.op == "get_attr" else self.results[item]
        if not isinstance(found, ir.Value):
            found = found.plain(self)
        return self._converted(found, self.dtype(item), dtype)

    def _converted(self, value: Value, given: torch.dtype, wanted: torch.dtype | None) -> Value:
        return value if wanted in (None, given) else self.cast(value, wanted)

    def _stored(self, node: fx.Node) -> Value:
        name = str(node.target)
        if ("stored", name) not in self.shared:
            constant = self.graph.constants[name]
            self.shared["stored", name] = self.initializer(name, constant.dtype, constant.shape, constant.materialize)
        found: Value = self.shared["stored", name]
        return found

    def optional(self, item: Any, dtype: torch.dtype | None = None) -> Value | None:
        """As `value`; None stays None."""
        return None if item is None else self.value(item, dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """To another type."""
        return self.op("Cast", value, to=DTYPES[dtype].value)

    @staticmethod
    def dtype(node: Any) -> torch.dtype:
        """Of the tensor that a node makes."""
        found: torch.dtype = node.meta["val"].dtype
        return found

    @staticmethod
    def shape(node: Any) -> list[Any]:
        """Of the tensor that a node makes: integers, and symbols where they are not known."""
        return list(node.meta["val"].shape)

    def cast_to(self, new: Any, dtype: torch.dtype) -> Value:
        """New vectors of a cache, which come in the type they are computed in, or float32 where they are to be packed."""
        made: Value = new.value
        given = torch.float32 if new.form else new.dtype
        return self._converted(made, given, dtype)

    def operands(self, node: fx.Node, *items: Any) -> list[Value]:
        """Tensors of the type that an elementwise operator computes in: what torch promotes them to."""
        values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in items]
        dtype = torch.result_type(*(self._example(value) for value in values[:2])) if len(values) > 1 else self.dtype(node)
        return [self.value(item, dtype) for item in items]

    @staticmethod
    def _example(value: Any) -> Any:
        """What torch promotes like `value`: sizes are integers."""
        if isinstance(value, torch.SymInt):
            return 1
        return torch.empty((1,) * min(value.dim(), 1), dtype=value.dtype) if isinstance(value, Tensor) else value

    # Sizes

    @staticmethod
    def is_size(item: Any) -> bool:
        """Whether a node gives a number, not a tensor."""
        return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), int | torch.SymInt)

    def size(self, item: Any) -> Value:
        """A size as int64 [1]."""
        if isinstance(item, fx.Node):
            known = item.meta.get("val")
            if isinstance(known, int):
                return self.ints([known])
            found: Value = self.results[item]
            return found
        if isinstance(item, torch.SymInt):
            raise self.refusal(f"expected a size that a node of the graph gives, got {item}")
        return self.ints([item])

    def sizes(self, items: Sequence[Any]) -> Value:
        """Sizes as int64 [n]: a constant where all are known."""
        known: list[Any] = [item.meta.get("val") if isinstance(item, fx.Node) else item for item in items]
        if all(isinstance(size, int) for size in known):
            return self.ints(known)
        if len(items) == 1:
            return self.size(items[0])
        return self.op("Concat", *(self.size(item) for item in items), axis=0)

    def size_of(self, value: Value, axis: int) -> Value:
        """The size of an axis of a tensor, int64 [1]."""
        key = ("size", id(value), axis)
        if key not in self.shared:
            self.shared[key] = self.op("Shape", value, start=axis, end=axis + 1)
        found: Value = self.shared[key]
        return found

    # Often

    def reshape(self, value: Value, sizes: Sequence[int]) -> Value:
        """To known sizes; 0 keeps that of the same axis, -1 is what is left."""
        return self.op("Reshape", value, self.ints(sizes))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Axes in another order; what only undoes the last change is what was there before it."""
        before = self.shared.get(("transposed", value))
        if before is not None and [before[1][axis] for axis in order] == list(range(len(order))):
            source: Value = before[0]
            return source
        made = self.op("Transpose", value, perm=list(order))
        self.shared["transposed", made] = (value, list(order))
        return made

    def slice(self, value: Value, axis: int, start: Any, end: Any = _END, step: int = 1) -> Value:
        """Part of an axis."""
        return self.op("Slice", value, self.size(start), self.size(end), self.ints([axis]), self.ints([step]))

    def swap_last(self, value: Value, rank: int) -> Value:
        """The last two axes exchanged."""
        order = list(range(rank))
        order[-2:] = order[-1], order[-2]
        return self.transpose(value, order)

    def refusal(self, reason: str) -> ExportError:
        """Why the current node cannot be exported."""
        node = self.current
        assert node is not None
        return ExportError(f"export_onnx: {where(node)}: {name_of(node.target) or node.target}: {reason}")


def static(values: Sequence[Any]) -> bool:
    """Whether all sizes are known."""
    return all(isinstance(value, int) for value in values)


def axis_of(axis: int, rank: int) -> int:
    """Counted from the front."""
    return axis + rank if axis < 0 else axis


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call by place or by name."""
    found: Mapping[str, Any] = node.kwargs
    return node.args[place] if len(node.args) > place else found.get(name, default)
