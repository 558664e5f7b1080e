"""A compiler for low-bit inference.

Names are imported when first used: `import qcompile` is fast, and a process that only loads and runs an artifact imports
neither a pass nor a front end.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcompile import errors
from qcompile.collecting import without_collecting
from qcompile.errors import QCompileError
from qcompile.version import __version__

if TYPE_CHECKING:
    from qcompile.blaming import blame
    from qcompile.compiled import CompiledModel, load
    from qcompile.compiler import compile  # noqa: A004  the public verb, always written qcompile.compile
    from qcompile.ir.graph import Graph
    from qcompile.passes.base import Pass
    from qcompile.planning.planner import plan
    from qcompile.planning.result import CompilationPlan
    from qcompile.quant.scheme import QuantFormat, QuantScheme
    from qcompile.target import Target

__all__ = [
    "CompilationPlan",
    "CompiledModel",
    "Graph",
    "Pass",
    "QCompileError",
    "QuantFormat",
    "QuantScheme",
    "Target",
    "__version__",
    "blame",
    "compile",
    "errors",
    "load",
    "plan",
]


def _home(name: str) -> str | None:
    """The module that holds the public name, or None."""
    match name:
        case "blame":
            return "qcompile.blaming"
        case "compile":
            return "qcompile.compiler"
        case "CompiledModel" | "load":
            return "qcompile.compiled"
        case "plan":
            return "qcompile.planning.planner"
        case "CompilationPlan":
            return "qcompile.planning.result"
        case "Graph":
            return "qcompile.ir.graph"
        case "Pass":
            return "qcompile.passes.base"
        case "QuantFormat" | "QuantScheme":
            return "qcompile.quant.scheme"
        case "Target":
            return "qcompile.target"
    return None


def __getattr__(name: str) -> Any:
    home = _home(name)
    if home is None:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}; public are {', '.join(__all__)}")
    with without_collecting():
        return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
