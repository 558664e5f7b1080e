"""How kernels read a weight: words of codes, each for one row of a tile, and the lines that turn a code into a float."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.contract import stored
from qcompile.codegen.cpp.contract import TYPES
from qcompile.codegen.cpp.source import Lines, function
from qcompile.errors import FormatError
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.scheme import dtype_name

WIDTHS = (2, 4, 8)
"""Bits of the integer codes that are read: those that a byte holds a whole number of."""
FLOAT_CHUNK = 128
"""Columns of a float weight that are summed before they join the total: shorter sums round less."""

MOST_GROUPS = 1024
"""Groups of a row with zero points: the sums of x over each of them stand on the stack."""


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in tiles of 16 rows (`qcompile.ir.layouts.tiles`).

    Attributes:
        bits: of a code, 32 for floats.
        group: columns that share a scale, 0 for all of a row; of floats those summed before they join the total.
        scale: C++ type of the scales, "" for floats.
        zero: whether there are zero points.
    """

    bits: int
    group: int
    scale: str = ""
    zero: bool = False

    @property
    def quantized(self) -> bool:
        """Whether there are codes."""
        return self.bits < 16

    @property
    def text(self) -> str:
        """In words."""
        if not self.quantized:
            return "float32 weights"
        return f"int{self.bits} codes, {f'groups of {self.group} columns' if self.group else 'one group a row'}, {self.scale} scales"

    @property
    def name(self) -> str:
        """What functions for this format begin with."""
        if not self.quantized:
            return "fp32"
        return f"int{self.bits}_{f'g{self.group}' if self.group else 'channel'}_{self.scale}{'_zero' if self.zero else ''}"

    @property
    def per_word(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    @property
    def middle(self) -> int:
        """The code of 0 without a zero point."""
        return 1 << (self.bits - 1)

    @property
    def word(self) -> str:
        """C++ type of a word."""
        return "int32_t" if self.quantized else "float"

    @property
    def vector(self) -> str:
        """C++ type of the words of several rows."""
        return "Ints" if self.quantized else "Floats"

    @property
    def scale_parameters(self) -> list[str]:
        """Parameters of a product beside the codes."""
        return [f"const {self.scale}* scale"] * bool(self.scale) + ["const uint8_t* zero"] * self.zero

    @property
    def zero_stride(self) -> str:
        """Zero points from one tile to the next, in tiles' rows: whole bytes of packed ones."""
        per_byte = 8 // self.bits
        return "groups" if per_byte == 1 else f"((groups + {per_byte - 1}) / {per_byte} * {per_byte})"

    @property
    def scale_strides(self) -> list[tuple[str, str]]:
        """Operands beside the codes, and how many of theirs a row has."""
        return [("scale", "groups")] * bool(self.scale) + [("zero", self.zero_stride)] * self.zero

    @property
    def zero_layout(self) -> str:
        """Of the zero points."""
        return "tiles" if self.bits == 8 else f"tiles-zero{self.bits}"

    @property
    def stride_constants(self) -> Lines:
        """How many words and scales a row has."""
        per, group = self.per_word, self.group
        lines = [f"const int64_t words = {'columns' if per == 1 else f'(columns + {per - 1}) / {per}'};"]
        return lines + [f"const int64_t groups = {f'(columns + {group - 1}) / {group}' if group else '1'};"] * bool(self.scale)

    @property
    def helpers(self) -> list[Lines]:
        """The functions that a product needs."""
        zero = function(
            "static inline Floats load_zero", ["const uint8_t* from", "float middle"], "Zero points as differences from the middle code.",
            ["return __builtin_convertvector(__builtin_convertvector(load_bits<Bytes>(from), Ints), Floats) - splat(middle);"],
        )  # fmt: skip
        return [code_function(self), *([zero] if self.zero else [])]


def code_function(weight: Weight) -> Lines:
    """The floats that the codes at one place of the words stand for, without scale and zero point."""
    if not weight.quantized:
        comment = "A float stands for itself."
        return function("static inline Floats fp32_code", ["Floats word", "int64_t"], comment, ["return word;"])
    bits = weight.bits
    shift = [f"return __builtin_convertvector(word << static_cast<int>({32 - bits} - {bits} * place) >> {32 - bits}, Floats);"]
    body = shift
    if bits < 8:
        numbers = [float(code if code < weight.middle else code - 2 * weight.middle) for code in range(1 << bits)]
        table = ", ".join(f"{value:g}" for value in numbers * (16 >> bits))
        body = [
            "#if defined(__AVX512F__)",
            f"const Floats table = {{{table}}};",
            f"return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> static_cast<int>({bits} * place)), table);",
            "#else",
            *shift,
            "#endif",
        ]
    comment = f"The numbers of {bits} bits at one place of each word."
    return function(f"static inline Floats {weight.name}_code", ["Ints word", "int64_t place"], comment, body)


def _format(spec: KernelSpec) -> QuantFormat | str:
    text = stored(spec, "codes")
    try:
        return parse_format(text)
    except FormatError as error:
        return f"codes are {text!r}: {error}"


def refuses_weight(spec: KernelSpec) -> str | None:
    """Why the codes, scales and zero points of a specification cannot be read, or None."""
    form = _format(spec)
    if isinstance(form, str):
        return form
    if not form.element.is_integer or form.element.bits not in WIDTHS:
        return f"codes are {form.element.name}: expected {' or '.join(f'int{bits}' for bits in WIDTHS)}"
    if spec.format("scale") != dtype_name(form.scale_dtype):
        return f"scale is {spec.format('scale')}: expected {dtype_name(form.scale_dtype)} as the codes' format says"
    if (spec.format("zero") is None) != form.symmetric:
        return f"zero is {spec.format('zero')}: expected {'none for symmetric' if form.symmetric else 'uint8 for asymmetric'} codes"
    groups = form.granularity.groups(spec.size("K"))
    return f"{groups} groups with zero points: expected at most {MOST_GROUPS}" if groups > MOST_GROUPS and not form.symmetric else None


def weight_of(spec: KernelSpec) -> Weight:
    """The weight of a specification that is not refused."""
    if spec.format("codes") is None:
        return Weight(32, FLOAT_CHUNK)
    form = _format(spec)
    assert isinstance(form, QuantFormat)
    group = form.granularity.size(spec.size("K"))
    return Weight(form.element.bits, 0 if group >= spec.size("K") else group, TYPES[dtype_name(form.scale_dtype)], not form.symmetric)
