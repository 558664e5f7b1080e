"""Quantized models are read back into packed weights and codes of activations, before they are traced.

A weight that a product, a convolution or a lookup reads through `DequantizeLinear`, or that `MatMulNBits` or `MatMulInteger` reads, becomes
codes, scale and zero point in qcompile's packing, with the values that the file means, bit for bit. Rounding of activations by one scale
becomes `quantize_static` and `dequantize_activation`. What has no format here stays as the file has it, and a warning says which and why.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from onnx import TensorProto

from qcompile.errors import QCompileError
from qcompile.frontend.onnx.described import codes_of, described, is_described, is_lookup, require_same, yields_columns
from qcompile.frontend.onnx.fusions import Idioms, factors, used
from qcompile.frontend.onnx.matrices import dequantized, integer_product, multiplied_bits
from qcompile.frontend.onnx.parts import CODES, Constants, Matrix, UnfitError, unsigned
from qcompile.frontend.onnx.program import Program, Step, blocks_of
from qcompile.frontend.onnx.registry import MICROSOFT, OWN

_PASSED = ("Cast", "Identity", "Transpose", "Reshape")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def read_back(program: Program) -> None:
    """Rewrite the steps of a program's body, in place, without those that nobody reads any more."""
    reader = _Reader(program)
    steps: list[Step] = []
    for step in program.body.steps:
        steps += reader.rewritten(step)
    program.body.steps = used(steps, set(program.body.outputs))
    unfit = {**dict(_left(program)), **reader.unfit}
    if unfit:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in list(unfit.items())[:5])
        more = f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        warnings.warn(f"{program.path}: quantized weights that are read as floats: {told}{more}", stacklevel=3)


def _left(program: Program) -> Iterator[tuple[str, str]]:
    """Names of quantized matrices and filters that are still dequantized, and what reads them."""
    for step in program.body.steps:
        stored = program.body.weights.get(step.inputs[0]) if step.operator == "DequantizeLinear" else None
        if stored is not None and len(stored.shape) > 1:
            readers = {reader.operator: None for reader in program.body.steps if step.outputs[0] in reader.inputs}
            yield step.outputs[0], f"{', '.join(readers) or 'the model'} reads its numbers"


class _Reader:
    """One pass over the steps."""

    def __init__(self, program: Program) -> None:
        self.constants = Constants(program)
        self.idioms = Idioms(program.body)
        self.unfit: dict[str, str] = {}
        self._unpacked: dict[tuple[str, bool, tuple[int, ...]], tuple[str, list[Step]]] = {}
        self._rounded: dict[str, tuple[int, bool]] = {}
        self._parts: dict[tuple[Any, ...], str] = {}
        self._readers: dict[str, list[Step | None]] = defaultdict(list)
        for step in program.body.steps:
            for name in (*step.inputs, *(item for block in blocks_of(step) for item in _outside(block))):
                self._readers[name].append(step)
        for name in program.body.outputs:
            self._readers[name].append(None)

    def rewritten(self, step: Step) -> list[Step]:
        """The steps in place of one; itself where there is nothing to read back."""
        rule = _Reader.lookup if is_lookup(step) else _RULES.get((step.domain, step.operator))
        try:
            found = None if rule is None else rule(self, step)
        except UnfitError as error:
            self.unfit.setdefault(step.inputs[0 if step.operator == "Gather" else 1], str(error))
            found = None
        return [step] if found is None else found

    # Weights

    def matmul(self, step: Step) -> list[Step] | None:
        """X times a weight [K, N]."""
        found = None if self.constants.known(step.inputs[0]) else self.unpacked(step.inputs[1], transposed=True)
        if found is None:
            return None
        return [*found[1], Step("Linear", OWN, step.name, (step.inputs[0], found[0]), step.outputs, {"transposed": 1})]

    def gemm(self, step: Step) -> list[Step] | None:
        """The same, with the weight [K, N] or [N, K]."""
        found = self.unpacked(step.inputs[1], transposed=not step.attributes.get("transB", 0))
        if found is None or self.constants.known(step.inputs[0]):
            return None
        inputs = (step.inputs[0], found[0], *step.inputs[2:])
        return [*found[1], replace(step, inputs=inputs, attributes={**step.attributes, "transB": 1})]

    def convolution(self, step: Step) -> list[Step] | None:
        """Filters [N, C, ...]."""
        found = self.unpacked(step.inputs[1], transposed=False)
        return None if found is None else [*found[1], replace(step, inputs=(step.inputs[0], found[0], *step.inputs[2:]))]

    def gather(self, step: Step) -> list[Step] | None:
        """Rows of a table [V, D]."""
        if step.attributes.get("axis", 0) != 0 or self.constants.known(step.inputs[1]):
            return None
        found = self.unpacked(step.inputs[0], transposed=False)
        return None if found is None else [*found[1], Step("Embedding", OWN, step.name, (found[0], step.inputs[1]), step.outputs, {})]

    def matmul_bits(self, step: Step) -> list[Step]:
        """Onnxruntime's product with blocks of codes."""
        plain = multiplied_bits(self.constants, step)
        name, unpack = self._unpack(self._told(step, plain, plain.numbers), step, f"{step.outputs[0]}/weight", ())
        bias = step.inputs[5:6] if any(step.inputs[5:6]) else ()
        return [unpack, Step("Linear", OWN, step.name, (step.inputs[0], name, *bias), step.outputs, {"transposed": 1})]

    def lookup(self, step: Step) -> list[Step] | None:
        """Rows of a table that is taken apart after they are taken."""
        taken = self._taken(step)
        if taken is None:
            return None
        matrix = described(self.constants, step)
        require_same(matrix, self._computed(step, {taken: torch.arange(matrix.rows)}))
        name, unpack = self._unpack(matrix, step, f"{step.outputs[0]}/table", ())
        return [unpack, Step("Embedding", OWN, step.name, (name, taken), step.outputs, {})]

    def _taken(self, step: Step) -> str | None:
        """The indices that take rows of the codes behind a step."""
        seen: set[str] = set()
        left = list(step.inputs)
        while left:
            maker = self.idioms.makers.get(left.pop())
            if maker is None or maker.outputs[0] in seen:
                continue
            if maker.operator == "Gather" and maker.inputs[0] == codes_of(step):
                return None if self.constants.known(maker.inputs[1]) else maker.inputs[1]
            seen.add(maker.outputs[0])
            left += maker.inputs
        return None

    def _computed(self, step: Step, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the file's own nodes make."""
        try:
            return self.constants.load(step.outputs[0], given)
        except QCompileError as error:
            raise UnfitError(f"its nodes cannot be computed: {error}") from error

    def _told(self, step: Step, plain: Matrix, numbers: Callable[[], torch.Tensor]) -> Matrix:
        """What a step tells of its weight, where that is true; else the weight as its operands say."""
        if not is_described(step):
            return plain
        try:
            found = described(self.constants, step)
            if found.form == plain.form:
                return plain  # what the operands say is what is computed
            require_same(found, numbers())
        except UnfitError as error:
            self.unfit.setdefault(plain.name, str(error))
            return plain
        return found

    def unpacked(self, name: str, *, transposed: bool) -> tuple[str, list[Step]] | None:
        """What holds the weight [N, K] or the filters behind a name, and the steps that make it; None for what is no quantized weight."""
        shape: tuple[int, ...] = ()
        step = self.idioms.makers.get(name)
        while step is not None and step.operator in _PASSED and not step.domain and not is_described(step):
            if step.operator == "Transpose":
                if list(step.attributes.get("perm", [1, 0])) != [1, 0] or shape:
                    return None
                transposed = not transposed
            if step.operator == "Reshape":
                if not self.constants.known(step.inputs[1]) or transposed:
                    return None
                shape = shape or tuple(int(size) for size in self.constants.load(step.inputs[1]))
            if step.operator == "Cast" and step.attributes.get("to") not in _FLOATS:
                return None
            step = self.idioms.makers.get(step.inputs[0])
        if step is None:
            return None
        if step.operator == "DequantizeLinear":
            return self._dequantized(step, transposed, shape) if self.constants.known(step.inputs[0]) else None
        if not is_described(step) or is_lookup(step) or not self.constants.known(step.outputs[0]):
            return None
        return self._dequantized(step, transposed, shape)

    def _matrix(self, step: Step, transposed: bool) -> Matrix:
        """The weight that a step makes, [N, K] or `transposed`."""

        def numbers() -> torch.Tensor:
            made = self._computed(step)
            return made.t() if transposed else made

        if step.operator == "DequantizeLinear":
            plain = dequantized(self.constants, step, transposed=transposed)
            return self._told(step, plain, numbers) if transposed == yields_columns(step) else plain
        if transposed != yields_columns(step):
            raise UnfitError("it is described as the transpose of what is multiplied by")
        found = described(self.constants, step)
        require_same(found, numbers())
        return found

    def _dequantized(self, step: Step, transposed: bool, shape: tuple[int, ...]) -> tuple[str, list[Step]]:
        key = (step.outputs[0], transposed, shape)
        if key in self._unpacked:
            return self._unpacked[key][0], []
        matrix = self._matrix(step, transposed)
        if shape and (len(shape) < 2 or 0 in shape[1:] or shape[0] not in (-1, 0, matrix.rows)):
            raise UnfitError(f"it is reshaped to {list(shape)}, whose rows are others")
        stored = self.constants.weights.get(step.inputs[0]) if step.operator == "DequantizeLinear" else None
        if stored is not None and len(stored.shape) > 2:
            shape = shape or stored.shape
        name = f"{step.outputs[0]}/{'columns' if transposed else 'rows'}{'x'.join(map(str, shape))}"
        name, unpack = self._unpack(matrix, step, name, shape)
        self._unpacked[key] = name, [unpack]
        return name, [unpack]

    def _unpack(self, matrix: Matrix, step: Step, name: str, shape: tuple[int, ...]) -> tuple[str, Step]:
        attributes: dict[str, Any] = {
            "bits": matrix.form.element.bits, "group_size": matrix.group_size, "columns": matrix.columns, "rows": matrix.rows,
            "element": matrix.form.element.kind,
        }  # fmt: skip
        if shape:
            attributes["shape"] = [matrix.rows, *shape[1:]]
        return name, Step("Unpack", OWN, step.name, matrix.parts(self.constants), (name,), attributes)

    # Activations

    def quantize(self, step: Step) -> list[Step] | None:
        """Rounding by one scale: codes without a sign are counted from -128, if nobody but a `DequantizeLinear` sees them."""
        kind = self._kind(step)
        if self.constants.known(step.inputs[0]) or kind not in CODES or not self._by_one_scale(step):
            return None
        bits, signed = CODES[kind]
        hidden = signed and bits == 8
        if not hidden and not all(
            reader is not None and reader.operator == "DequantizeLinear" for reader in self._readers[step.outputs[0]]
        ):
            return None
        if not all(self._by_one_scale(reader) for reader in self._readers[step.outputs[0]] if _is(reader, "DequantizeLinear")):
            return None
        scale, zero = self._scale_parts(step, bits, signed)
        self._rounded[step.outputs[0]] = bits, signed
        return [Step("QuantizeStatic", OWN, step.name, (step.inputs[0], scale, zero), step.outputs, {"bits": bits})]

    def dequantize(self, step: Step) -> list[Step] | None:
        """The numbers that such codes stand for."""
        if step.inputs[0] not in self._rounded:
            return None
        bits, signed = self._rounded[step.inputs[0]]
        scale, zero = self._scale_parts(step, bits, signed)
        return [Step("DequantizeActivation", OWN, step.name, (step.inputs[0], scale, zero), step.outputs, {})]

    def _kind(self, step: Step) -> int:
        if len(step.inputs) > 2 and step.inputs[2]:
            return self.constants.kind(step.inputs[2])
        return int(step.attributes.get("output_dtype", 0)) or TensorProto.UINT8

    def _by_one_scale(self, step: Step | None) -> bool:
        """Whether scale and zero point are constants of one element, in float32 or less."""
        if step is None or step.attributes.get("block_size", 0) or step.attributes.get("precision", 0) not in (0, TensorProto.FLOAT):
            return False
        names = [name for name in step.inputs[1:] if name]
        return all(self.constants.known(name) and not _more_than_one(self.constants.shape(name)) for name in names)

    def _scale_parts(self, step: Step, bits: int, signed: bool) -> tuple[str, str]:
        """Constants float32 [1] and int32 [1], the second left out where it is 0; equal ones are one."""
        scale = self.constants.load(step.inputs[1]).float().reshape(1)
        zero = 0 if signed else -(1 << (bits - 1))
        if len(step.inputs) > 2 and step.inputs[2]:
            stored = unsigned(self.constants.load(step.inputs[2]), bits, signed)
            zero = int(stored) - (1 << (bits - 1))
        base = step.inputs[0].removesuffix("_QuantizeLinear_Output")
        return self._number(f"{base}.scale", scale, TensorProto.FLOAT), "" if zero == 0 else self._zero(f"{base}.zero", zero)

    def _zero(self, name: str, zero: int) -> str:
        return self._number(name, torch.tensor([zero], dtype=torch.int32), TensorProto.INT32)

    def _number(self, name: str, value: Any, kind: int) -> str:
        key = (kind, value.item())
        if key not in self._parts:
            self._parts[key] = self.constants.part(name, kind, (1,), lambda: value)
        return self._parts[key]

    # Products of integers

    def scaled_product(self, step: Step) -> list[Step] | None:
        """A `MatMulInteger` with a weight, multiplied by the activations' scale and the weight's."""
        names = list(factors(self.idioms, step, 3))
        casts = [(name, cast) for name in names if (cast := self.idioms.made_by(name, "Cast")) is not None]
        sums = [(name, found) for name, cast in casts if (found := self._integers(cast)) is not None]
        rest = [name for name in names if not sums or name != sums[0][0]]
        if len(sums) != 1 or len(rest) != 2:
            return None
        product, shift = sums[0][1]
        ordered = sorted(rest, key=lambda name: (self.constants.known(name), self.constants.known(name) and self.constants.shape(name)))
        x_scale, w_scale = ordered
        codes, weight, zero, w_zero = (*product.inputs, "", "")[:4]
        if not self.constants.known(w_scale) or (w_zero and not self.constants.known(w_zero)) or self.constants.known(codes):
            return None
        if any(self.constants.known(name) and _more_than_one(self.constants.shape(name)) for name in (x_scale, zero) if name):
            return None
        plain = integer_product(self.constants, weight, w_zero, w_scale)
        matrix = self._told(product, plain, plain.numbers)
        if shift is not None and (zero or not self._shifts(shift[1], matrix)):
            return None
        parts = matrix.parts(self.constants)
        attributes = {"bits": matrix.form.element.bits, "rows": matrix.rows}
        inputs = (codes, x_scale, zero if shift is None else shift[0], *parts)
        return [Step("IntegerLinear", OWN, step.name, inputs, step.outputs, attributes)]

    def _integers(self, cast: Step) -> tuple[Step, tuple[str, str] | None] | None:
        """The product behind a cast to floats, and the zero point and sums of columns whose product is taken off it, if any is."""
        if cast.attributes.get("to") != TensorProto.FLOAT:
            return None
        product = self.idioms.made_by(cast.inputs[0], "MatMulInteger")
        if product is not None:
            return product, None
        difference = self.idioms.made_by(cast.inputs[0], "Sub")
        product = None if difference is None else self.idioms.made_by(difference.inputs[0], "MatMulInteger")
        taken = None if difference is None else self.idioms.made_by(difference.inputs[1], "Mul")
        if product is None or taken is None:
            return None
        for zero, sums in self.idioms.splits(taken):
            if self.constants.known(sums):
                return product, (zero, sums)
        return None

    def _shifts(self, sums: str, matrix: Matrix) -> bool:
        """Whether a constant is the sum of each column of a symmetric weight."""
        if not matrix.form.symmetric:
            return False
        wanted = (matrix.codes().to(torch.int32) - (1 << (matrix.form.element.bits - 1))).sum(1)
        return torch.equal(self.constants.load(sums).reshape(-1).to(wanted.dtype), wanted)


def _is(step: Step | None, operator: str) -> bool:
    return step is not None and step.operator == operator


def _more_than_one(shape: tuple[int, ...]) -> bool:
    return any(size != 1 for size in shape)


def _outside(block: Any) -> Iterator[str]:
    """Names that a branch reads."""
    yield from block.outputs
    for step in block.steps:
        yield from step.inputs
        for inner in blocks_of(step):
            yield from _outside(inner)


_RULES: dict[tuple[str, str], Callable[[_Reader, Step], list[Step] | None]] = {
    ("", "MatMul"): _Reader.matmul, ("", "Gemm"): _Reader.gemm, ("", "Conv"): _Reader.convolution, ("", "Gather"): _Reader.gather,
    (MICROSOFT, "MatMulNBits"): _Reader.matmul_bits, ("", "Mul"): _Reader.scaled_product,
    ("", "QuantizeLinear"): _Reader.quantize, (MICROSOFT, "QuantizeLinear"): _Reader.quantize,
    ("", "DequantizeLinear"): _Reader.dequantize, (MICROSOFT, "DequantizeLinear"): _Reader.dequantize,
}  # fmt: skip
