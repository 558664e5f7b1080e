"""Constants of an ONNX file that are made from others: codes, scales and zero points as qcompile stores them, read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qcompile.frontend.onnx.interpreter import OnnxModule
from qcompile.frontend.onnx.kinds import kind_of
from qcompile.frontend.onnx.program import Block, Program, Step, blocks_of
from qcompile.frontend.onnx.weights import Weight
from qcompile.ir.constants import Constant
from qcompile.quant.format import QuantFormat
from qcompile.quant.packing import pack
from qcompile.quant.reference import dequantize, part_dtype, part_shape

CODES: dict[int, tuple[int, bool]] = {
    TensorProto.INT8: (8, True), TensorProto.UINT8: (8, False), TensorProto.INT4: (4, True), TensorProto.UINT4: (4, False),
    TensorProto.INT2: (2, True), TensorProto.UINT2: (2, False),
}  # fmt: skip
"""Element type of codes -> their bits, and whether they have a sign."""
SCALES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
}  # fmt: skip
"""What a scale is stored as -> its element type."""
KINDS_OF_SCALES: dict[torch.dtype, int] = SCALES | {
    torch.int8: TensorProto.INT8, torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN, torch.float8_e8m0fnu: TensorProto.FLOAT8E8M0,
}  # fmt: skip
"""The same with those of 8 bits."""
_ENDINGS = (".columns", ".rows", ".blocks", ".codes", "_quantized", "_Q2", "_Q4", "_Q8", "_transposed")
"""What exporters and quantizers put behind a weight's name."""
_KEEPS_VALUES = ("Cast", "Identity", "Reshape", "Expand", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


class UnfitError(Exception):
    """Raised for a quantized weight that has no format here; the message says why."""


def plain_name(name: str) -> str:
    """A weight's name without what was put behind it when it was quantized."""
    while True:
        ending = next((item for item in _ENDINGS if name.endswith(item) and name != item), None)
        if ending is None:
            return name
        name = name.removesuffix(ending)


@dataclass(frozen=True, eq=False)
class Part(Weight):
    """A constant that `make` computes from the file's own; `format` as for `Constant`."""

    make: Callable[[], Tensor] = field(kw_only=True, repr=False)
    format: QuantFormat | None = field(default=None, kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """As stored; a power of two is one of few things that a file keeps otherwise."""
        return torch.float8_e8m0fnu if self.kind == TensorProto.FLOAT8E8M0 else super().dtype

    def load(self) -> Tensor:
        """Compute it."""
        return self.make()

    def stand_in(self) -> Tensor:
        """A tensor to trace with."""
        return torch.empty(self.shape, dtype=self.dtype) if self.kind == TensorProto.FLOAT8E8M0 else super().stand_in()

    def constant(self) -> Constant:
        """A handle for the graph, in the dtype it is stored as."""
        return Constant(self, format=self.format)


def _given(file: str, name: str, value: Tensor) -> Weight:
    return Weight(file, name, kind_of(value.dtype), tuple(value.shape), numpy_helper.from_array(value.numpy(), name), "given:")


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

    def load(self, name: str, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """The value: floats as they are stored, elements of 2 and 4 bits in a byte each; `given` are values that are no constants."""
        if name in self.weights:
            return self.weights[name].load()
        held = {item: _given(self.program.path.name, item, value) for item, value in (given or {}).items()}
        steps: list[Step] = []
        wanted = {name}
        for step in reversed(self.steps):
            if (wanted - held.keys()) & set(step.outputs):
                wanted |= set(step.inputs)
                steps.append(step)
        used = {item: weight for item, weight in {**self.weights, **held}.items() if item in wanted}
        missing = wanted - used.keys() - {item for step in steps for item in step.outputs} - {""}
        if missing:
            raise UnfitError(f"{missing.pop()} is no constant")
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
        zero: makes the unsigned zero points uint8 [N, G], or the minima; nobody asks for them where the format is symmetric.
        scale2: makes the second level of scales, where the format has one.
    """

    name: str
    rows: int
    columns: int
    form: QuantFormat
    codes: Callable[[], Tensor]
    scale: Callable[[], Tensor]
    zero: Callable[[], Tensor] | None
    scale2: Callable[[], Tensor] | None = None

    @property
    def group_size(self) -> int:
        """As operators take it."""
        size = self.form.granularity.group_size
        return -1 if size == -1 else self.form.granularity.size(self.columns)

    def numbers(self) -> Tensor:
        """The weight float32 [N, K] that it stands for."""
        bits = self.form.element.bits
        zero = None if self.form.symmetric else self._zero()
        second = None if self.scale2 is None else self.scale2()
        codes, kind = pack(self.codes(), bits), self.form.element.kind
        return dequantize(codes, self.scale(), zero, bits, self.group_size, self.columns, torch.float32, kind, second)

    def parts(self, constants: Constants) -> tuple[str, ...]:
        """Names of codes, scale, zero point (empty if there is none) and, where the format has it, the second scale as new constants."""
        bits = self.form.element.bits
        makers: dict[str, Callable[[], Tensor]] = {
            "codes": lambda: pack(self.codes(), bits), "scale": self.scale, "zero": self._zero,
        }  # fmt: skip
        if self.scale2 is not None:
            makers["scale2"] = self.scale2
        made = {}
        for part in self.form.parts:
            dtype = part_dtype(self.form, part)
            kind = TensorProto.UINT8 if dtype == torch.uint8 else KINDS_OF_SCALES[dtype]
            shape = part_shape(self.form, part, self.rows, self.columns)
            made[part] = constants.part(f"{self.name}.{part}", kind, shape, makers[part], self.form)
        return (made["codes"], made["scale"], made.get("zero", ""), *((made["scale2"],) if "scale2" in made else ()))

    def _zero(self) -> Tensor:
        """As it is stored: zero points packed."""
        assert self.zero is not None
        return self.zero() if self.form.minimum else pack(self.zero(), self.form.element.bits)
