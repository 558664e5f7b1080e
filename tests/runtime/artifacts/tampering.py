"""What a bit error, or somebody with an editor and a hash function, does to an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.runtime.manifest import canonical, file_entry, seal
from qcompile.runtime.weights import chunk_hashes

PROMPTS = [[3, 14, 15, 92, 65, 35], [89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]]
Change = Callable[[Any], None]


def reseal(root: Path, *names: str, change: Change | None = None) -> None:
    """What an attacker can do: hashes of changed files and of the manifest made right again."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    for name in names:
        if name == "weights.safetensors":
            manifest["weights"] |= {"bytes": (root / name).stat().st_size, "sha256": chunk_hashes(root / name)}
        else:
            manifest["files"][name] = file_entry((root / name).read_bytes())
    if change is not None:
        change(manifest)
    (root / "manifest.json").write_bytes(seal({key: value for key, value in manifest.items() if key != "sha256"}))


def alter(root: Path, name: str, change: Change) -> None:
    """Change a JSON file of the artifact and reseal it."""
    data = json.loads((root / name).read_bytes())
    change(data)
    (root / name).write_bytes(canonical(data))
    reseal(root, name)


def flip(path: Path, place: int, bit: int = 1) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def node_of(graph: Any, target: str) -> Any:
    return next(node for node in graph["nodes"] if node.get("target") == target)


def step_of(plan: Any, operator: str) -> Any:
    return next(step for step in plan["entries"]["decode"]["steps"] if step["operator"] == operator)


# --- what is written comes back
