"""Constants of an ONNX file that are made from others: codes, scales and zero points as qcompile stores them, read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from onnx import TensorProto
from torch import Tensor

from qcompile.frontend.onnx.interpreter import OnnxModule
from qcompile.frontend.onnx.program import Block, Program, Step, blocks_of
from qcompile.frontend.onnx.weights import Weight
from qcompile.ir.constants import Constant
from qcompile.quant.format import QuantFormat
from qcompile.quant.packing import pack

CODES: dict[int, tuple[int, bool]] = {
    TensorProto.INT8: (8, True), TensorProto.UINT8: (8, False), TensorProto.INT4: (4, True), TensorProto.UINT4: (4, False),
    TensorProto.INT2: (2, True), TensorProto.UINT2: (2, False),
}  # fmt: skip
"""Element type of codes -> their bits, and whether they have a sign."""
SCALES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
}  # fmt: skip
"""What a scale is stored as -> its element type."""
_KEEPS_VALUES = ("Cast", "Identity", "Reshape", "Expand", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True, eq=False)
class Part(Weight):
    """A constant that `make` computes from the file's own; `format` as for `Constant`."""

    make: Callable[[], Tensor] = field(kw_only=True, repr=False)
    format: QuantFormat | None = field(default=None, kw_only=True)

    def load(self) -> Tensor:
        """Compute it."""
        return self.make()

    def constant(self) -> Constant:
        """A handle for the graph, in the dtype it is stored as."""
        return Constant(self, format=self.format)


def unsigned(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """Codes, or zero points, of a byte each as uint8 that begin at 0."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8) if signed else codes.to(torch.uint8)


class Constants:
    """What a program's constants, and steps on constants alone, amount to."""

    def __init__(self, program: Program) -> None:
        """Of its body; branches are no part of it."""
        self.program = program
        self.weights = program.body.weights
        self.steps = list(program.body.steps)
        self.makers = {name: step for step in self.steps for name in step.outputs if name}
        self._known: dict[str, bool] = {}

    def known(self, name: str) -> bool:
        """Whether a value depends on constants alone."""
        if name in self.weights:
            return True
        if name not in self._known:
            step = self.makers.get(name)
            self._known[name] = step is not None and not blocks_of(step) and all(self.known(used) for used in step.inputs if used)
        return self._known[name]

    def stored(self, name: str) -> Weight | None:
        """The constant behind what only moves, repeats or widens its elements."""
        while name not in self.weights:
            step = self.makers.get(name)
            if step is None or step.domain or step.operator not in _KEEPS_VALUES:
                return None
            name = step.inputs[0]
        return self.weights[name]

    def kind(self, name: str) -> int:
        """The element type of what only moves or casts a constant, else 0."""
        while name not in self.weights:
            step = self.makers.get(name)
            if step is None or step.domain or step.operator not in _KEEPS_VALUES:
                return 0
            if step.operator == "Cast":
                return int(step.attributes["to"])
            name = step.inputs[0]
        return self.weights[name].kind

    def load(self, name: str) -> Tensor:
        """The value: floats as they are stored, elements of 2 and 4 bits in a byte each."""
        if name in self.weights:
            return self.weights[name].load()
        steps: list[Step] = []
        wanted = {name}
        for step in reversed(self.steps):
            if wanted & set(step.outputs):
                wanted |= set(step.inputs)
                steps.append(step)
        used = {item: weight for item, weight in self.weights.items() if item in wanted}
        program = Program(self.program.path, self.program.opset, [], Block((), used, steps[::-1], (name,)), {})
        value: Tensor = OnnxModule(program, load=True)()
        stored = self.stored(name)
        return value.to(stored.dtype) if stored is not None and value.is_floating_point() and stored.dtype in SCALES else value

    def shape(self, name: str) -> tuple[int, ...]:
        """The value's shape; what is computed is computed for it."""
        return self.weights[name].shape if name in self.weights else tuple(self.load(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `load` gives."""
        return self.weights[name].dtype if name in self.weights else self.load(name).dtype

    def part(self, name: str, kind: int, shape: tuple[int, ...], make: Callable[[], Tensor], form: QuantFormat | None = None) -> str:
        """A new constant called `name`; returns the name that steps read it by, which nothing else has."""
        unique, count = name, 0
        while unique in self.weights or unique in self.makers:
            count += 1
            unique = f"{name}_{count}"
        self.weights[unique] = Part(self.program.path.name, name, kind, shape, TensorProto(), "packed:", make=make, format=form)
        return unique


@dataclass(frozen=True)
class Matrix:
    """A quantized weight [N, K] that a file holds.

    Attributes:
        name: what its parts are called after.
        rows: N.
        columns: K.
        form: the format it has.
        codes: makes the unsigned codes uint8 [N, K].
        scale: makes the scales [N, G] as the format stores them.
        zero: makes the unsigned zero points uint8 [N, G]; nobody asks for them where the format is symmetric.
    """

    name: str
    rows: int
    columns: int
    form: QuantFormat
    codes: Callable[[], Tensor]
    scale: Callable[[], Tensor]
    zero: Callable[[], Tensor] | None

    @property
    def group_size(self) -> int:
        """As operators take it."""
        size = self.form.granularity.group_size
        return -1 if size == -1 else self.form.granularity.size(self.columns)

    def parts(self, constants: Constants) -> tuple[str, str, str]:
        """Names of codes, scale and zero point (empty if there is none) as new constants."""
        from qcompile.quant.reference import part_shape

        bits = self.form.element.bits
        made: list[str] = []
        makers = {"codes": lambda: pack(self.codes(), bits), "scale": self.scale, "zero": lambda: pack(self._zero(), bits)}
        for part in self.form.parts:
            kind = SCALES[self.form.scale_dtype] if part == "scale" else TensorProto.UINT8
            shape = part_shape(self.form, part, self.rows, self.columns)
            made.append(constants.part(f"{self.name}.{part}", kind, shape, makers[part], self.form))
        codes, scale, zero = (*made, "")[:3]
        return codes, scale, zero

    def _zero(self) -> Tensor:
        assert self.zero is not None
        return self.zero()
