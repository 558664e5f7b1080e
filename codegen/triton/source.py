"""Composing source: kernels are lists of lines, put together by plain functions; nothing here knows an operator."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

Lines = list[str]
LINE_LENGTH = 140


def indent(lines: Iterable[str], levels: int = 1) -> Lines:
    """The lines moved right by `levels` of four spaces; empty lines stay empty."""
    return [f"{'    ' * levels}{line}" if line else "" for line in lines]


def constants(values: Mapping[str, tuple[int | float, str]]) -> Lines:
    """Compile-time numbers of a kernel, each with what it means: `N: tl.constexpr = 576  # output rows`."""
    return [f"{name}: tl.constexpr = {value}  # {meaning}" for name, (value, meaning) in values.items()]


def loop(header: str, body: Iterable[str]) -> Lines:
    """A compound statement and its indented body."""
    return [f"{header}:", *indent(body)]


def load(target: str, pointer: str, mask: str, other: str = "0.0", suffix: str = "") -> Lines:
    """`target = tl.load(pointer, mask, other)SUFFIX`, over several lines where it does not fit into one."""
    line = f"{target} = tl.load({pointer}, mask={mask}, other={other}){suffix}"
    if len(line) <= LINE_LENGTH - 8:
        return [line]
    return [f"{target} = tl.load(", *indent([f"{pointer},", f"mask={mask},", f"other={other},"]), f"){suffix}"]


def function(name: str, parameters: Iterable[str], docstring: str, body: Iterable[str]) -> Lines:
    """One `@triton.jit` function; the parameters stand on one line each where they do not fit into one."""
    names = list(parameters)
    head = [f"def {name}({', '.join(names)}):"]
    if len(head[0]) > LINE_LENGTH:
        head = [f"def {name}(", *indent(f"{parameter}," for parameter in names), "):"]
    return ["@triton.jit", *head, *indent([f'"""{docstring}"""', *body])]


def module(docstring: Iterable[str], functions: Iterable[Lines]) -> str:
    """The whole file: docstring, imports, functions. Parsed once, so that a slip in an emitter fails here and not at the GPU."""
    lines = ['"""' + "\n".join(docstring), '"""', "", "import triton", "import triton.language as tl"]
    for body in functions:
        lines += ["", "", *body]
    text = "\n".join(lines) + "\n"
    ast.parse(text)
    return text
