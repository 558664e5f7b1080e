"""Who may import whom: read from the source of every module, and seen in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "data", "progress", "kept", "collecting"),
    ("quant",),
    ("target",),
    ("ir",),
    ("passes", "codegen", "runtime"),
    ("frontend", "exporters", "dump"),
    ("compiled", "rebuild"),
    ("blaming", "compiler", "evaluation", "speed"),
    ("planning", "torch_backend"),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
APART = {"passes", "codegen", "runtime"}
NOT_AT_RUN_TIME = {"transformers", "triton", "onnx", "onnx_ir", "onnxruntime", "networkx", "gguf", "accelerate", "huggingface_hub"}
EXCEPT = {("qcompile.runtime.engines.onnxruntime", "onnxruntime")}
"""Who may import what it runs by, when it runs: the engine of that name; the test of a fresh process holds it to that."""
FRONT_DOOR = "qcompile"
"""The package itself: it imports lazily what it offers, and only the command line speaks to it."""


def _modules() -> list[Path]:
    return sorted(_walk(ROOT / "qcompile"))


def _walk(folder: Path) -> list[Path]:
    """Modules below `folder`, through links (which `rglob` follows only in later Pythons)."""
    return [path for entry in folder.iterdir() for path in (_walk(entry) if entry.is_dir() else [entry]) if path.suffix == ".py"]


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else FRONT_DOOR


def imports_of(source: str) -> set[str]:
    """Every module imported anywhere in `source`: at the top, in functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(importer: str, source: str) -> list[str]:
    """Imports that break the order, as text; `importer` is a dotted module name."""
    room = _room(importer)
    broken = []
    for target in sorted(imports_of(source)):
        if target.split(".")[0] != "qcompile":
            if room == "runtime" and target.split(".")[0] in NOT_AT_RUN_TIME and (importer, target) not in EXCEPT:
                broken.append(f"{importer} imports {target}, which the runtime does without")
            continue
        other = _room(target)
        if not _allowed(room, other):
            broken.append(f"{importer} ({room}) imports {target} ({other})")
    return broken


def _allowed(room: str, other: str) -> bool:
    if room in (other, FRONT_DOOR):
        return True
    if other == FRONT_DOOR:
        return room == "cli"
    return RANK[other] < RANK[room] or (RANK[other] == RANK[room] and room not in APART)


def test_every_room_has_a_layer() -> None:
    rooms = {path.relative_to(ROOT / "qcompile").parts[0].removesuffix(".py") for path in _modules()}
    assert rooms - {"__init__"} <= set(RANK)


def test_imports_point_down() -> None:
    broken = []
    for path in _modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        broken += violations(module, path.read_text(encoding="utf-8"))
    assert not broken


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("qcompile.quant.scheme", "from qcompile.ir.graph import Graph"),
        ("qcompile.passes.base", "import qcompile.runtime.artifact"),
        ("qcompile.codegen.reference", "def f():\n    from qcompile.passes import base"),
        ("qcompile.runtime.generate", "import transformers.utils"),
        ("qcompile.ir.graph", "import qcompile"),
        ("qcompile.compiled", "from qcompile import compiler"),
    ],
)
def test_a_broken_order_is_seen(importer: str, source: str) -> None:
    assert len(violations(importer, source)) == 1


def test_runtime_brings_nothing_else_along() -> None:
    """A process that serves artifacts: whatever the runtime, the model object and the package import, looked at in `sys.modules`."""
    runtime = [path for path in _modules() if path.relative_to(ROOT / "qcompile").parts[0] == "runtime"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in runtime]
    rooms = ("passes", "codegen", "frontend", "exporters", "compiler")
    script = "\n".join(
        [
            "import sys, importlib, qcompile",
            "assert 'torch' not in sys.modules, 'import qcompile imports torch'",
            f"for name in {['qcompile.compiled', *names]}: importlib.import_module(name)",
            f"forbidden = {sorted(NOT_AT_RUN_TIME | {f'qcompile.{room}' for room in rooms})}",
            "print(*(name for name in forbidden if name in sys.modules))",
        ]
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
