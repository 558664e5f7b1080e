"""An exported program as a Graph: parameters become constant handles, devices become the CPU, containers become templates."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from qcompile.errors import TraceError, UnsupportedModelError
from qcompile.frontend.functional import ASSERTIONS, IDENTITIES, counterpart, functional, writes
from qcompile.ir.allowed import name_of
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph, Interface, operator_name
from qcompile.ir.structure import template_of

Binder = Callable[[str, Tensor], Constant]

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CPU = torch.device("cpu")


def user_frame(frames: Iterable[tuple[str, int]]) -> str:
    """`file.py:line` of the innermost frame that is neither torch's nor this front end's, or an empty text."""
    own = str(Path(__file__).parent)
    outside = [(file, line) for file, line in frames if "/torch/" not in file and not file.startswith(own)]
    return f"{Path(outside[-1][0]).name}:{outside[-1][1]}" if outside else ""


class Converter:
    """One conversion; `graph()` gives the result."""

    def __init__(self, program: ExportedProgram, bind: Binder | None, name: str) -> None:
        """Read an exported program whose constants become what `bind(name, traced tensor)` says (default: the tensors themselves)."""
        self.program = program = functional(program)
        self.name = name
        self.bind = bind or (lambda _, tensor: tensor_constant(tensor))
        self.mode = _mode(program)
        self.nodes = fx.Graph()
        self.mapping: dict[fx.Node, Any] = {}
        self.constants: dict[str, Constant] = {}
        self._shared: dict[object, fx.Node] = {}
        # A tied weight goes by the first of its names, such as the embedding's rather than the head's.
        self._names = {identity(tensor): name for name, tensor in reversed(program.state_dict.items())}

    def graph(self) -> Graph:
        """The program as a Graph without dead nodes, every operator of it allowed."""
        specs = self.program.graph_signature.input_specs
        entries = list(zip(self.program.graph.find_nodes(op="placeholder"), specs, strict=True))
        inputs = [self._input(node, spec) for node, spec in entries if spec.kind is InputKind.USER_INPUT]
        for node, spec in entries:
            if spec.kind in _HELD:
                self.mapping[node] = self._constant(spec) if node.users else None
            elif spec.kind is not InputKind.USER_INPUT:
                raise UnsupportedModelError(
                    f"{self.name}: {node.name}: expected tensors, got a {spec.kind.name.lower()}; pass plain tensors instead"
                )
        for node in self.program.graph.find_nodes(op="output"):
            self._body(self.program.graph_module)
            results = self._results(node)
        interface = Interface(
            self._template(self.program.call_spec.in_spec, inputs), self._template(self.program.call_spec.out_spec, results)
        )
        self.nodes.output(tuple(item for item in results if isinstance(item, fx.Node)))
        graph = Graph(self.nodes, self.constants, interface, self.mode)
        graph.output.meta.update({"val": tuple(node.meta["val"] for node in graph.output.all_input_nodes), "source": "", "passes": ()})
        graph.remove_dead()
        refuse_operators(graph, self.name)
        return graph

    def _input(self, node: fx.Node, spec: InputSpec) -> Any:
        if isinstance(spec.arg, ConstantArgument):
            return spec.arg.value
        if not isinstance(spec.arg, TensorArgument):
            raise TraceError(
                f"{self.name}: input {node.name}: expected a tensor, got a number that varies; pass it as a tensor, or leave it fixed"
            )
        self.mapping[node] = self._place(self.nodes.placeholder(node.name), node)
        return self.mapping[node]

    def _constant(self, spec: InputSpec) -> fx.Node:
        name = str(spec.target)
        tensor = self.program.state_dict[name] if name in self.program.state_dict else self.program.constants[name]
        key = identity(tensor)
        if key not in self._shared:
            name = self._names.get(key, name)
            self.constants[name] = self.bind(name, tensor)
            node = self._shared[key] = self.nodes.get_attr(name)
            with self.mode:
                node.meta["val"] = torch.empty(self.constants[name].shape, dtype=self.constants[name].dtype)
            node.meta.update({"source": "", "passes": ()})
        return self._shared[key]

    def _body(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target not in ASSERTIONS:
                self.mapping[node] = self._call(module, node)

    def _call(self, module: fx.GraphModule, node: fx.Node) -> Any:
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            return self._inline(getattr(module, str(node.args[1].target)), node.args[2:])  # type: ignore[union-attr]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnsupportedModelError(
                f"{self.name}: {node.name} ({_source(node)}): expected plain operators, got the control flow {node.target}; "
                "export the branch or the loop body by itself"
            )
        args, kwargs = pytree.tree_map(self._operand, (node.args, node.kwargs))
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if node.target in IDENTITIES:
            return args[0]
        target = counterpart(node) if writes(node) else self._plain(node)
        args = _with_epsilon(node, tuple(args))
        copied = self._place(self.nodes.create_node("call_function", target, args, dict(kwargs), node.name), node)  # type: ignore[arg-type]
        if writes(node):
            self.mapping[node.args[0]] = copied  # type: ignore[index]  # later users of what was written see the new value
        return copied

    @staticmethod
    def _plain(node: fx.Node) -> Any:
        """`x.T` of a matrix is spelled `t`."""
        is_matrix_transpose = node.target is torch.ops.aten.numpy_T.default and node.meta["val"].dim() <= 2
        return torch.ops.aten.t.default if is_matrix_transpose else node.target

    def _inline(self, body: fx.GraphModule, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """A region of `torch.no_grad()`, of which only the body matters."""
        self.mapping.update(zip(body.graph.find_nodes(op="placeholder"), map(self._operand, operands), strict=True))
        self._body(body)
        results = next(iter(body.graph.find_nodes(op="output"))).args[0]
        return tuple(map(self._operand, results))

    def _operand(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            return self.mapping[item]
        return _CPU if isinstance(item, torch.device) else item

    def _place(self, node: fx.Node, origin: fx.Node) -> fx.Node:
        node.meta.update({"val": pytree.tree_map(self._value, origin.meta.get("val")), "source": _source(origin), "passes": ()})
        node.meta["origins"] = _origin(origin)
        return node

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor) and (value.device != _CPU or value.requires_grad or not isinstance(value, FakeTensor)):
            with self.mode:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        return value

    def _results(self, output: fx.Node) -> list[Any]:
        results = []
        for item, spec in zip(output.args[0], self.program.graph_signature.output_specs, strict=True):  # type: ignore[arg-type]
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise UnsupportedModelError(
                    f"{self.name}: expected a forward without side effects, got one that changes {spec.target or spec.arg.name}; "
                    "return the new value instead, and put the module in evaluation mode"
                )
            if isinstance(item, fx.Node) and not isinstance(item.meta.get("val"), Tensor):
                raise TraceError(f"{self.name}: output {item.name}: expected a tensor, got a size that varies; return tensors only")
            results.append(self.mapping[item] if isinstance(item, fx.Node) else item)
        return results

    @staticmethod
    def _template(tree: Any, flat: list[Any]) -> Any:
        template, leaves = template_of(pytree.tree_unflatten(flat, tree))
        order = [node for node in flat if isinstance(node, fx.Node)]
        if leaves != order:
            raise TraceError(
                f"expected containers that keep the order of their values, got {[node.name for node in leaves]}, "
                f"in the trace {[node.name for node in order]}; use tuples, lists and dicts"
            )
        return template


def _with_epsilon(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The epsilon of a norm that leaves it to the dtype, which passes may change: that of the dtype it was traced in."""
    if node.target is not torch.ops.aten.rms_norm.default or (len(args) > 3 and args[3] is not None):
        return args
    return (*(*args, None)[:3], torch.finfo(node.meta["val"].dtype).eps)


def identity(tensor: Tensor) -> object:
    """What two names of one tied weight have in common: the object on `meta`, else the place in memory."""
    if tensor.device.type == "meta" or not tensor.numel() or isinstance(tensor, FakeTensor):
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def refuse_operators(graph: Graph, name: str) -> None:
    """Name every operator that is not on the allow-list.

    Raises:
        UnsupportedModelError: with node, source line and operator of the first five.
    """
    refused = [node for node in graph.nodes if node.op == "call_function" and name_of(node.target) is None]
    if refused:
        shown = "; ".join(f"{node.name} ({node.meta['source']}): {operator_name(node.target)}" for node in refused[:5])
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UnsupportedModelError(
            f"{name}: expected operators of the allow-list, got {shown}{more}; rewrite these lines with ordinary tensor operators"
        )


def _source(node: fx.Node) -> str:
    """The model's line, or the node of the file that it was read from."""
    told = (node.meta.get("custom") or {}).get("source")
    if told:
        return str(told)
    return user_frame((file, int(line)) for file, line in _FRAME.findall(node.meta.get("stack_trace") or ""))


def _origin(node: fx.Node) -> tuple[str, ...]:
    """The traced operator itself, with the module that called it: `model.layers.0.mlp: aten.mul.Tensor mul_19`."""
    if node.op != "call_function":
        return ()
    modules = [str(path) for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
    call = f"{operator_name(node.target)} {node.name}"
    named = modules and modules[-1] and not modules[-1].startswith("_")  # the tracer's own have an underscore
    return (f"{modules[-1]}: {call}" if named else call,)


def _mode(program: ExportedProgram) -> FakeTensorMode:
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return FakeTensorMode()
