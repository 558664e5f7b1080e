"""An ONNX graph as an `nn.Module` whose forward runs it node by node with torch: `torch.export` traces that forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx import traceback
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from qcompile.errors import QCompileError, UnsupportedModelError
from qcompile.frontend.onnx import rules as _rules  # noqa: F401  registers the rules
from qcompile.frontend.onnx.kinds import BITS
from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.program import Block, Program, Step
from qcompile.frontend.onnx.registry import MICROSOFT, NUMBER_RULES, RULES
from qcompile.frontend.onnx.unsigned import MOVES, on_integers
from qcompile.frontend.onnx.values import Held, NeedsConstantError, NotNumbersError, Numbers, RefusalError, Value, known_numbers
from qcompile.frontend.onnx.weights import Weight

Scope = dict[str, Value]

_MOST_FOLDED = 1024


class UnreadableInputError(UnsupportedModelError):
    """A node needs a value while it is traced that the caller gives at run time; `name` is its ONNX name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class OnnxModule(nn.Module):
    """Runs a program. Inputs are keywords under names that Python allows; weights are buffers.

    Attributes:
        keywords: ONNX name of an input -> keyword.
        weights: buffer -> handle on its bytes.
    """

    def __init__(self, program: Program, *, load: bool = False) -> None:
        """With `load`, weights are read, so that the module itself can be run; else they are stand-ins to trace with."""
        super().__init__()
        self.program = program
        self.keywords = keyword_names([item.name for item in program.inputs])
        self.weights: dict[str, Weight] = {}
        self._buffer_of: dict[int, str] = {}
        self._load = load
        self._register(program.body)
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.keywords.values()]
        self.forward = _with_signature(self._forward, parameters)

    def _register(self, block: Block) -> None:
        for weight in block.weights.values():
            buffer = f"weight_{len(self.weights)}"
            self.weights[buffer] = weight
            self._buffer_of[id(weight)] = buffer
            self.register_buffer(buffer, _as_traced(weight) if self._load else weight.stand_in())
        for step in block.steps:
            for value in step.attributes.values():
                if isinstance(value, Block):
                    self._register(value)

    def _forward(self, **inputs: Tensor) -> Any:
        given = {name: _widened(inputs[keyword]) for name, keyword in self.keywords.items()}
        kinds = {item.name: item.kind for item in self.program.inputs}
        names = self.program.body.outputs
        results = self._run_block(self.program.body, dict(given), kinds)
        tensors = [_result(value, name, self.program) for name, value in zip(names, results, strict=True)]
        return tensors[0] if len(tensors) == 1 else dict(zip(names, tensors, strict=True))

    def _run_block(self, block: Block, outer: Scope, kinds: dict[str, int]) -> list[Value]:
        scope = dict(outer)
        for name, weight in block.weights.items():
            scope[name] = Held(getattr(self, self._buffer_of[id(weight)]), weight)
        for step in block.steps:
            with traceback.annotate({"source": step.name}):
                results = self._run_step(step, scope, kinds)
            scope.update({name: value for name, value in zip(step.outputs, results, strict=False) if name})
        return [scope[name] for name in block.outputs]

    def _run_step(self, step: Step, scope: Scope, kinds: dict[str, int]) -> Sequence[Value]:
        inputs = [scope[name] if name else None for name in step.inputs]
        node = Node(
            step.operator, self.program.opset, inputs, step.inputs, [kinds.get(name) for name in step.inputs], step.attributes,
            step.outputs, lambda block: self._run_block(block, scope, kinds),
        )  # fmt: skip
        try:
            results = _apply(node, step)
            _note_kind(node, kinds)
            return results  # noqa: TRY300  (what follows are messages)
        except NeedsConstantError as error:
            raise UnreadableInputError(self._message(step, str(error)), error.name) from error
        except RefusalError as error:
            raise UnsupportedModelError(self._message(step, str(error))) from error
        except GuardOnDataDependentSymNode as error:
            reason = "expected sizes that the inputs decide, got one that values decide, which the node must know while it is traced"
            raise UnsupportedModelError(self._message(step, reason, "cut the model before what makes it")) from error
        except (QCompileError, TorchDynamoException, ConstraintViolationError):
            raise
        # Torch's own complaint about operands: a model whose shapes or types do not go together, or a case torch does not have.
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            seen = ", ".join(_seen(value) for value in inputs)
            reason = f"expected operands that torch can compute with, got {seen}: {first}"
            remedy = "pass example_inputs of sizes that the model takes, or check it with onnx.checker"
            raise UnsupportedModelError(self._message(step, reason, remedy)) from error

    def _message(self, step: Step, reason: str, remedy: str = "export the model without it") -> str:
        operator = f"{step.domain}.{step.operator}" if step.domain else f"{step.operator}, opset {self.program.opset}"
        return f"{self.program.path}: node {step.name!r} ({operator}): {reason}; {remedy}"


def _apply(node: Node, step: Step) -> Sequence[Value]:
    results = _on_numbers(node) if step.domain != MICROSOFT else None
    if results is None:
        rule = RULES.get((step.domain, step.operator))
        if rule is None:
            raise RefusalError(f"expected an operator that the importer has a rule for, got {step.operator}")
        results = on_integers(node, rule)
    results = results if isinstance(results, tuple) else (results,)
    unread = node.unread()
    if unread:
        raise RefusalError(f"expected nothing beyond what its rule knows, got {', '.join(unread)}")
    if len(results) < len(node.outputs) and any(node.outputs[len(results) :]):
        raise RefusalError(f"expected {len(results)} outputs, got {len(node.outputs)}")
    return results


def _note_kind(node: Node, kinds: dict[str, int]) -> None:
    """Remember that a result has elements of 2 or 4 bits, which its dtype does not tell; what only moves bits keeps them."""
    made = node.made
    if made is None and node.operator in MOVES and node.inputs and isinstance(node.inputs[0], Tensor | Held):
        made = node.kind(0)
    if made in BITS:
        kinds.update({name: made for name in node.outputs if name})


def _on_numbers(node: Node) -> Any:
    """The result of a node on numbers alone, or None if it is not one."""
    rule = NUMBER_RULES.get(node.operator)
    given = [value for value in node.inputs if value is not None]
    if rule is None or not all(isinstance(value, Numbers) or (isinstance(value, Held) and _is_small(value, given)) for value in given):
        return None
    original = node.inputs
    node.inputs = [known_numbers(value.weight) if isinstance(value, Held) else value for value in original]
    try:
        return rule(node)
    except NotNumbersError:
        node.inputs = original
        node.read.clear()
        return None


def _is_small(value: Held, given: Sequence[Value]) -> bool:
    """Whether a constant may be computed with here: weights of floats stay weights unless a size is involved."""
    if not value.weight.dtype.is_floating_point:
        return value.weight.numel <= _MOST_FOLDED
    return value.weight.numel <= (_MOST_FOLDED if any(isinstance(item, Numbers) for item in given) else 1)


def _seen(value: Value) -> str:
    if isinstance(value, Held):
        value = value.tensor
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value.flat) if isinstance(value, Numbers) else "nothing" if value is None else "a sequence"


def _result(value: Value, name: str, program: Program) -> Tensor:
    if isinstance(value, Held):
        return value.tensor
    if isinstance(value, Numbers):
        return value.tensor()
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"{program.path}: output {name!r}: expected a tensor, got a sequence; export the model with tensors as outputs"
        )
    return value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _as_traced(weight: Weight) -> Tensor:
    return _widened(weight.load())


def _with_signature(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
    """The same function of keywords, telling which: `torch.export` names inputs by it."""

    def forward(*args: Tensor, **kwargs: Tensor) -> Any:
        bound = signature.bind(*args, **kwargs)
        return function(**bound.arguments)

    signature = inspect.Signature(list(parameters))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def keyword_names(names: Sequence[str]) -> dict[str, str]:
    """ONNX name -> Python identifier, unique: `input.1` becomes `input_1`."""
    from keyword import iskeyword

    table: dict[str, str] = {}
    for name in names:
        plain = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name) or "input"
        plain = f"input_{plain}" if plain[0].isdigit() or iskeyword(plain) else plain
        unique, count = plain, 0
        while unique in table.values():
            count += 1
            unique = f"{plain}_{count}"
        table[name] = unique
    return table
