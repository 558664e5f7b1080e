"""Users' own code: passes and predicates, imported by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from qcompile.errors import PipelineError
from qcompile.passes.base import Pass
from qcompile.passes.pipelines import registry

ImportOption = Annotated[
    list[str] | None, typer.Option("--import", help="A module with passes of your own, or module:Class; repeatable. Its code runs.")
]


def known_passes(names: Sequence[str] | None) -> dict[str, type[Pass]]:
    """Every registered pass by name, and those of the modules (`module` or `module:Class`) that `names` lists.

    Raises:
        PipelineError: for a module that cannot be imported, or that holds no such pass.
    """
    known = registry()
    for name in names or ():
        module, _, wanted = name.partition(":")
        found = [item for item in vars(_module(module, "--import")).values() if _is_pass(item) and wanted in ("", item.__name__)]
        if not found:
            raise PipelineError(f"--import {name}: expected {wanted or 'a subclass of Pass'} in the module {module}, got none")
        known |= {item.name: item for item in found}
    return known


def function(text: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` names, with or without `python:` before it.

    Raises:
        PipelineError: if there is no such module or function.
    """
    module, separator, name = text.removeprefix("python:").rpartition(":")
    found = getattr(_module(module, option), name, None) if separator else None
    if not callable(found):
        raise PipelineError(f"{option} {text}: expected python:module:function, got {'no such function' if separator else 'no colon'}")
    return found  # type: ignore[no-any-return]


def _is_pass(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Pass) and "name" in vars(item)


def _module(name: str, option: str) -> ModuleType:
    """Import a module, also from the working directory, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PipelineError(f"{option} {name}: expected a module that can be imported, got {error}") from error
    finally:
        sys.path.remove(here)
