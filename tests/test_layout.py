"""Where things stand: the top level, the links into the package, and what a bare import does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "runtime")
TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "benchmarks", "codegen", "constraints.txt", "docs", "examples",
    "passes", "pyproject.toml", "qcompile", "runtime", "tests",
}  # fmt: skip


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def _tracked() -> list[str]:
    """Files that are tracked, or would be by `git add -A`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return _git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()


def test_top_level_holds_nothing_else() -> None:
    assert {path.split("/")[0] for path in _tracked()} == TOP_LEVEL


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_relative_links(room: str) -> None:
    link = ROOT / "qcompile" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert f"qcompile/{room}" in _tracked()


def test_links_are_committed_as_links() -> None:
    entries = [line.split() for line in _git("ls-files", "--stage", "qcompile").splitlines()] if _tracked() else []
    modes = {path: mode for mode, _, _, path in entries if path in {f"qcompile/{room}" for room in ROOMS}}
    assert modes == {f"qcompile/{room}": "120000" for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_bare_import_raises(room: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"ImportError: import qcompile.{room}, not {room}: a bare import would load every module twice" in run.stderr


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for room in ("qcompile", *ROOMS) for path in (ROOT / room).rglob("*.py")}
    assert not sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file())


def test_no_configuration_outside_pyproject() -> None:
    others = {"setup.py", "setup.cfg", "tox.ini", "pytest.ini", "mypy.ini", "ruff.toml", ".ruff.toml", ".coveragerc"}
    assert not [path for path in _tracked() if Path(path).name in others]
