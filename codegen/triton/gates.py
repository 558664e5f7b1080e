"""What a binary must satisfy before it is shipped: no spills, shared memory within the limit, the instructions that were meant."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcompile.codegen.triton.tiles import Architecture
from qcompile.errors import KernelBuildError

MOST_REGISTERS = 255
INSTRUCTION_CLASSES = {
    "mma": r"\b[HI]MMA\.\d+|\b[HI]MMA\.",
    "wgmma": r"\b[HI]GMMA\.",
    "tcgen05": r"\bUTC[A-Z]*MMA\b",
    "imma": r"\bIMMA\.",
    "igmma": r"\bIGMMA\.",
    "qmma": r"\bQMMA\.",
    "qgmma": r"\bQGMMA\.",
    "utcqmma": r"\bUTCQMMA\b",
    "cp.async": r"\bLDGSTS\b|\bUTMALDG\b",
    "local": r"\b(?:LDL|STL)\b",
    "load128": r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS(?:\.\w+)*\.128\b",
}


@dataclass(frozen=True)
class Usage:
    """What a binary takes and contains: registers a thread, bytes of local memory a thread, instruction classes."""

    registers: int
    local_bytes: int
    classes: frozenset[str]


def triton_folder() -> Path:
    """Where the triton package lies, found without importing it.

    Raises:
        KernelBuildError: if it is not installed.
    """
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise KernelBuildError("kernels for an NVIDIA GPU are built with triton, which is not installed: pip install qcompile[triton]")
    return Path(found.submodule_search_locations[0])


def inspect_binary(binary: Path) -> Usage:
    """Read registers, local memory and instruction classes with the tools inside the Triton wheel."""
    tools = triton_folder() / "backends" / "nvidia" / "bin"
    resources = _run(tools / "cuobjdump", "-res-usage", binary)
    registers, stack, local = (re.search(rf"\b{name}:(\d+)", resources) for name in ("REG", "STACK", "LOCAL"))
    if registers is None:
        raise KernelBuildError(f"cuobjdump -res-usage {binary.name}: expected a line with REG:, got {resources[:200]!r}")
    listing = _run(tools / "nvdisasm", "-c", binary)
    classes = frozenset(name for name, pattern in INSTRUCTION_CLASSES.items() if re.search(pattern, listing))
    return Usage(int(registers[1]), sum(int(match[1]) for match in (stack, local) if match), classes)


def _run(tool: Path, option: str, binary: Path) -> str:
    done = subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelBuildError(f"{tool.name} {option} {binary.name} failed: {done.stderr.strip()[:300]}")
    return done.stdout


def objection(usage: Usage, shared_bytes: int, arch: Architecture, *, local_meant: bool = False) -> str | None:
    """Why a binary would be slow or would not launch, or None.

    Args:
        usage: what `inspect_binary` read.
        shared_bytes: dynamic shared memory the launch asks for.
        arch: where it shall run.
        local_meant: whether local memory is part of the design (a kernel says so by expecting `local`).
    """
    if shared_bytes > arch.shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory, {arch.name} has {arch.shared_bytes}; take a smaller tile or fewer stages"
    if usage.local_bytes and not local_meant:
        return f"spills {usage.local_bytes} bytes a thread ({usage.registers} registers); take a smaller tile or more warps"
    if usage.registers > MOST_REGISTERS:
        return f"expected at most {MOST_REGISTERS} registers, got {usage.registers}"
    return None


def check_classes(kernel: str, expects: tuple[str, ...], classes: frozenset[str]) -> None:
    """Refuse a kernel none of whose binaries contains an instruction class it was made for.

    Raises:
        KernelBuildError: naming the kernel, the missing class, and what is there.
    """
    for name in expects:
        if name not in INSTRUCTION_CLASSES:
            raise KernelBuildError(f"{kernel}: instruction class {name!r} is unknown; expected one of {', '.join(INSTRUCTION_CLASSES)}")
        if name not in classes:
            raise KernelBuildError(
                f"{kernel}: expected {name} instructions, found {', '.join(sorted(classes)) or 'none of the known classes'}"
            )
