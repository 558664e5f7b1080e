"""Elements that are not integers, and scales that are not floats of 16 or 32 bits: source lines that turn their bits into numbers.

A small float becomes a large one by putting its exponent and mantissa into the low bits of the large one's and multiplying by the
difference of the biases, a power of two: exact, subnormal numbers included, and no conversion instruction that an older GPU lacks.
"""

from __future__ import annotations

from qcompile.codegen.triton.source import Lines, function, load
from qcompile.quant.element import NF4

TABLES = ("nf4", "fp4", "fp8")
SCALE_STORAGE = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "e8m0": "float8_e8m0fnu", "e4m3": "fp8e4nv", "int8": "i8"}
"""A format's name of a scale -> how a specification calls its operand's storage."""
SECOND_LEVEL = {"e4m3": "fp32", "int8": "fp16"}
"""Scales that have scales -> the storage of those."""
AS_BYTES = ("e8m0", "e4m3")
"""Scales that kernels read as bytes."""


def scale_pointer(kind: str) -> str:
    """Triton's type of a scale as a kernel reads it."""
    return "u8" if kind in AS_BYTES else SCALE_STORAGE[kind]


def element_float32(element: str, code: str) -> str:
    """The float32 number that a code of 4 or 8 bits, a uint32, stands for."""
    if element == "nf4":
        return f"nf4({code})"
    if element == "fp4":
        return f"((({code} & 7) << 22) | (({code} & 8) << 28)).to(tl.float32, bitcast=True) * {2.0**126}"
    return f"((({code} & 127) << 20) | (({code} & 128) << 24)).to(tl.float32, bitcast=True) * {2.0**120}"


def scale_lines(kind: str, row: str, group: str, mask: str, suffix: str) -> Lines:
    """`scale_SUFFIX`, float32, of a row and a group as they broadcast."""
    name, place = f"scale_{suffix}", f"scale + {row} * GROUPS + {group}"
    if kind == "e8m0":
        return [*load(name, place, mask, "0", ".to(tl.uint32)"), f"{name} = ({name} << 23).to(tl.float32, bitcast=True)"]
    if kind == "e4m3":
        return [*load(name, place, mask, "0", ".to(tl.uint32)"), f"{name} = {element_float32('fp8', name)} * tl.load(scale2)"]
    if kind == "int8":
        second = load(f"second_{suffix}", f"scale2 + {row} * RUNS2 + {group} // RUN2", mask, suffix=".to(tl.float32)")
        return [*load(name, place, mask, "0", ".to(tl.float32)"), *second, f"{name} *= second_{suffix}"]
    return load(name, place, mask, suffix=".to(tl.float32)")


def nf4_function() -> Lines:
    """A tree of selections: one level for each bit of the code."""
    assert NF4.values is not None
    names = [str(value) for value in NF4.values]
    body = []
    for level in range(4):
        body.append(f"bit = (code & {1 << level}) != 0")
        chosen = [f"level{level}_{pair}" for pair in range(len(names) // 2)]
        body += [f"{name} = tl.where(bit, {names[2 * pair + 1]}, {names[2 * pair]})" for pair, name in enumerate(chosen)]
        names = chosen
    return function(
        "nf4", ["code"], "The quantile of a normal distribution that a code stands for, float32.", [*body, f"return {names[0]}"]
    )
