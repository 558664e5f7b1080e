"""Composing C++: kernels are lists of lines, put together by plain functions; nothing here knows an operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Lines = list[str]
LINE_LENGTH = 120
SEPARATOR = "\n\n"
"""Between the functions of a kernel's source; what two kernels share stands once in the file of both (`unique`)."""


def indent(lines: Iterable[str], levels: int = 1) -> Lines:
    """The lines moved right by `levels` of four spaces; empty lines and those for the preprocessor stay where they are."""
    return [f"{'    ' * levels}{line}" if line and not line.startswith("#") else line for line in lines]


def constants(values: Mapping[str, tuple[int, str]]) -> Lines:
    """Compile-time numbers, each with what it means: `constexpr int64_t N = 576;  // output rows`."""
    return [f"constexpr int64_t {name} = {value};  // {meaning}" for name, (value, meaning) in values.items()]


def number(value: float) -> str:
    """A float literal that is read back as the same float32 as `value` is rounded to."""
    if value != value or value in (float("inf"), float("-inf")):
        return "NAN" if value != value else f"{'-' if value < 0 else ''}INFINITY"
    return f"{float(value)!r}f"


def block(header: str, body: Iterable[str]) -> Lines:
    """A compound statement and its indented body."""
    return [f"{header} {{", *indent(body), "}"]


def call(function: str, arguments: Iterable[str]) -> Lines:
    """A call as a statement; the arguments stand on a line of their own where they do not fit behind its name."""
    given = ", ".join(arguments)
    line = f"{function}({given});"
    return [line] if len(line) <= LINE_LENGTH - 24 else [f"{function}(", f"    {given});"]


def when(condition: object, lines: Iterable[str]) -> Lines:
    """The lines where the condition holds at compile time, else none."""
    return list(lines) if condition else []


def function(head: str, parameters: Iterable[str], comment: str, body: Iterable[str]) -> Lines:
    """One function under its comment; the parameters stand on one line each where they do not fit into one."""
    names = list(parameters)
    line = f"{head}({', '.join(names)})"
    if len(line) > LINE_LENGTH:
        line = f"{head}(\n    " + ",\n    ".join(names) + ")"
    return [f"// {comment}", *block(line, body)]


def joined(functions: Iterable[Lines]) -> str:
    """The source of functions, one after the other; none of them may hold an empty line."""
    return SEPARATOR.join("\n".join(lines) for lines in functions) + "\n"


def unique(sources: Iterable[str]) -> list[str]:
    """The functions of several sources in order, each once."""
    return list(dict.fromkeys(part for source in sources for part in source.rstrip("\n").split(SEPARATOR)))
