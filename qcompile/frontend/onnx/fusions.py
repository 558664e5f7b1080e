"""Idioms of exporters become the one operator they mean, before tracing: what passes look for then has one spelling.

A fusion replaces the last step of an idiom; the others go when nobody reads them any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from qcompile.frontend.onnx.program import Block, Step, blocks_of
from qcompile.frontend.onnx.registry import OWN
from qcompile.frontend.onnx.values import known_numbers
from qcompile.frontend.onnx.weights import Weight


class Idioms:
    """The steps of a block by what they make."""

    def __init__(self, block: Block) -> None:
        """Of the block's own steps and constants."""
        self.block = block
        self.makers = {name: step for step in block.steps for name in step.outputs if name}

    def made_by(self, name: str, operator: str) -> Step | None:
        """The step that makes a value, if it is a plain `operator`."""
        step = self.makers.get(name)
        return step if step is not None and step.operator == operator and step.domain == "" else None

    def weight(self, name: str, dims: int) -> Weight | None:
        """A constant of floats with so many dimensions."""
        weight = self.block.weights.get(name)
        return weight if weight is not None and len(weight.shape) == dims and weight.dtype.is_floating_point else None

    def is_number(self, name: str, *wanted: float) -> bool:
        """Whether a value is a constant near one of these numbers."""
        weight = self.block.weights.get(name)
        if weight is None or weight.numel != 1:
            return False
        return any(math.isclose(known_numbers(weight).flat[0], number, rel_tol=1e-6) for number in wanted)

    def splits(self, step: Step) -> Iterator[tuple[str, str]]:
        """Both orders of two operands."""
        if len(step.inputs) == 2:
            yield step.inputs[0], step.inputs[1]
            yield step.inputs[1], step.inputs[0]


Fusion = Callable[[Idioms, Step], list[Step] | None]


def _becomes(step: Step, operator: str, inputs: tuple[str, ...], domain: str = "", **attributes: Any) -> Step:
    return Step(operator, domain, step.name, inputs, step.outputs, attributes)


def silu(idioms: Idioms, step: Step) -> list[Step] | None:
    """X · sigmoid(x)."""
    for x, gate in idioms.splits(step):
        maker = idioms.made_by(gate, "Sigmoid")
        if maker is not None and maker.inputs[0] == x:
            return [_becomes(step, "Swish", (x,))]
    return None


def gelu(idioms: Idioms, step: Step) -> list[Step] | None:
    """X · (1 + erf(x / √2)) · 0.5, multiplied in any order."""
    factors = list(_factors(idioms, step, 2))
    if len(factors) != 3:
        return None
    halves = [name for name in factors if idioms.is_number(name, 0.5)]
    rest = [name for name in factors if name not in halves]
    if len(halves) != 1 or len(rest) != 2:
        return None
    for x, other in (rest, rest[::-1]):
        if _erf_of(idioms, other) == x:
            return [_becomes(step, "Gelu", (x,))]
    return None


def _factors(idioms: Idioms, step: Step, depth: int) -> Iterator[str]:
    for name in step.inputs:
        maker = idioms.made_by(name, "Mul") if depth > 1 else None
        if maker is None:
            yield name
        else:
            yield from _factors(idioms, maker, depth - 1)


def _erf_of(idioms: Idioms, name: str) -> str | None:
    """The x of 1 + erf(x / √2)."""
    total = idioms.made_by(name, "Add")
    for wave, one in idioms.splits(total) if total is not None else ():
        erf = idioms.made_by(wave, "Erf")
        if erf is None or not idioms.is_number(one, 1.0):
            continue
        scaled = idioms.makers.get(erf.inputs[0])
        if scaled is None or scaled.operator not in ("Div", "Mul"):
            return None
        wanted = math.sqrt(2) if scaled.operator == "Div" else math.sqrt(0.5)
        return scaled.inputs[0] if idioms.is_number(scaled.inputs[1], wanted) else None
    return None


def inverse_root(idioms: Idioms, step: Step) -> list[Step] | None:
    """1 / sqrt(v); and x / sqrt(v + ε) as x · (1 / sqrt(v + ε)), as norms are recognised."""
    if step.operator == "Reciprocal":
        root = idioms.made_by(step.inputs[0], "Sqrt")
        return None if root is None else [_becomes(step, "Rsqrt", root.inputs, OWN)]
    root = idioms.made_by(step.inputs[1], "Sqrt")
    if root is None or idioms.made_by(root.inputs[0], "Add") is None:
        return None
    if idioms.is_number(step.inputs[0], 1.0):
        return [_becomes(step, "Rsqrt", root.inputs, OWN)]
    inverse = Step("Rsqrt", OWN, step.name, root.inputs, (f"{step.outputs[0]}/rsqrt",), {})
    return [inverse, _becomes(step, "Mul", (step.inputs[0], inverse.outputs[0]))]


def layer_norm(idioms: Idioms, step: Step) -> list[Step] | None:
    """(x - mean) / sqrt(mean of its squares + ε) · gain + bias, over the last axis, as written before opset 17."""
    for scaled, bias in idioms.splits(step):
        product = idioms.made_by(scaled, "Mul")
        if product is None or idioms.weight(bias, 1) is None:
            continue
        for normed, gain in idioms.splits(product):
            found = _normed(idioms, normed) if idioms.weight(gain, 1) is not None else None
            if found is not None:
                return [_becomes(step, "LayerNormalization", (found[0], gain, bias), axis=-1, epsilon=found[1])]
    return None


def _normed(idioms: Idioms, name: str) -> tuple[str, float] | None:
    """The x and ε of a division by the deviation."""
    division = idioms.made_by(name, "Div")
    root = None if division is None else idioms.made_by(division.inputs[1], "Sqrt")
    total = None if root is None else idioms.made_by(root.inputs[0], "Add")
    if division is None or total is None:
        return None
    x = _centred(idioms, division.inputs[0])
    for variance, epsilon in idioms.splits(total):
        weight = idioms.block.weights.get(epsilon)
        mean = idioms.made_by(variance, "ReduceMean")
        if x is None or weight is None or weight.numel != 1 or mean is None or not _over_last(idioms, mean):
            continue
        if _centred(idioms, _squared(idioms, mean.inputs[0])) == x:
            return x, float(known_numbers(weight).flat[0])
    return None


def _centred(idioms: Idioms, name: str) -> str | None:
    """The x of x - mean(x)."""
    difference = idioms.made_by(name, "Sub")
    mean = None if difference is None else idioms.made_by(difference.inputs[1], "ReduceMean")
    if difference is None or mean is None or mean.inputs[0] != difference.inputs[0] or not _over_last(idioms, mean):
        return None
    return difference.inputs[0]


def _squared(idioms: Idioms, name: str) -> str:
    power, product = idioms.made_by(name, "Pow"), idioms.made_by(name, "Mul")
    if power is not None and idioms.is_number(power.inputs[1], 2.0):
        return power.inputs[0]
    return product.inputs[0] if product is not None and product.inputs[0] == product.inputs[1] else ""


def _over_last(idioms: Idioms, mean: Step) -> bool:
    axes = mean.attributes.get("axes")
    if axes is None and len(mean.inputs) > 1 and mean.inputs[1] in idioms.block.weights:
        axes = idioms.block.weights[mean.inputs[1]].elements()
    return axes is not None and list(axes) == [-1] and bool(mean.attributes.get("keepdims", 1))


def linear(idioms: Idioms, step: Step) -> list[Step] | None:
    """A product with a weight, transposed or not, plus a bias."""
    for product, bias in idioms.splits(step):
        maker, vector = idioms.made_by(product, "MatMul"), idioms.weight(bias, 1)
        if maker is None or vector is None or maker.inputs[0] in idioms.block.weights:
            continue
        weight, transposed = maker.inputs[1], 0
        turn = idioms.made_by(weight, "Transpose")
        if turn is not None and list(turn.attributes.get("perm", [1, 0])) == [1, 0]:
            weight, transposed = turn.inputs[0], 1
        matrix = idioms.weight(weight, 2)
        if matrix is not None and matrix.shape[0 if transposed else 1] == vector.shape[0] > 1:
            return [_becomes(step, "Linear", (maker.inputs[0], weight, bias), OWN, transposed=transposed)]
    return None


FUSIONS: dict[str, tuple[Fusion, ...]] = {
    "Mul": (silu, gelu),
    "Reciprocal": (inverse_root,),
    "Add": (layer_norm, linear),
    "Div": (inverse_root,),
}
"""Operator of an idiom's last step -> what it may be, the longest first."""


def fuse(block: Block) -> None:
    """Replace idioms, in place, in the block and the branches inside, and drop steps that nobody reads.

    Later idioms are looked for in the steps as the file has them, so that a norm is seen whole although its parts are idioms too.
    """
    idioms = Idioms(block)
    steps: list[Step] = []
    for step in block.steps:
        for inner in blocks_of(step):
            fuse(inner)
        found = (fusion(idioms, step) for fusion in FUSIONS.get(step.operator, ()) if not step.domain)
        steps += next((made for made in found if made is not None), [step])
    block.steps = _used(steps, set(block.outputs))


def _used(steps: list[Step], wanted: set[str]) -> list[Step]:
    kept: list[Step] = []
    for step in reversed(steps):
        if wanted & set(step.outputs):
            wanted |= {*step.inputs, *(name for inner in blocks_of(step) for name in _read(inner))}
            kept.append(step)
    return kept[::-1]


def _read(block: Block) -> set[str]:
    """Names that a branch reads, its own included."""
    names = {*block.outputs, *(name for step in block.steps for name in step.inputs)}
    return names.union(*(_read(inner) for step in block.steps for inner in blocks_of(step)))
