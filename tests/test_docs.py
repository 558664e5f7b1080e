"""What the documents name exists, and what they show runs."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from qcompile.cli.app import app
from qcompile.quant.cache_format import CACHES, CacheFormat

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("qcompile", "passes", "codegen", "runtime", "examples", "tests", "docs", "benchmarks")
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
BY_NAME = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def fences(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [body for _, language, body in FENCE.findall(path.read_text()) if language in languages]


def _spans(path: Path) -> list[str]:
    """Everything in single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text()))


def missing_paths(spans: list[str]) -> list[str]:
    """Those that look like a path of the repository and are none."""
    paths = [span for span in spans if re.fullmatch(rf"(?:{'|'.join(ROOMS)})/[\w./*-]*|\w+\.(?:py|md)|Makefile", span)]
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


def missing_names(spans: list[str]) -> list[str]:
    """Dotted names of the package that do not resolve."""
    names = [match[0] for span in spans if (match := re.match(r"qcompile(?:\.\w+)+(?=$|\()", span))]
    return [name for name in names if not _resolves(name)]


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def _options() -> dict[str, set[str]]:
    """Command -> its options."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    return {
        name: {option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


def wrong_commands(lines: list[str]) -> list[str]:
    """Calls of `qcompile` with a command or an option that does not exist."""
    known = _options()
    everything = set().union(*known.values())
    wrong = []
    for line in lines:
        for call in re.findall(r"(?:^|&& )qcompile ([^&#\n]+)", line):
            command, *arguments = call.split()
            options = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
            if not options <= known.get(command, set()) or command not in known:
                wrong.append(call.strip())
        if re.fullmatch(r"--[a-z][a-z-]+( [A-Z]+)?", line) and line.split()[0] not in everything:
            wrong.append(line)
    return wrong


@BY_NAME
def test_paths_and_names_exist(path: Path) -> None:
    spans = _spans(path)
    assert missing_paths(spans) == []
    assert missing_names(spans) == []


@BY_NAME
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", FENCE.sub("", path.read_text()))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@BY_NAME
def test_commands_and_options_exist(path: Path) -> None:
    lines = [line.strip() for body in fences(path, "sh") for line in body.splitlines()]
    assert wrong_commands([*_spans(path), *lines]) == []


def test_the_changelog_names_every_command() -> None:
    listed = re.search(r"`qcompile ([a-z]+(?: \| [a-z]+)+)`", (ROOT / "CHANGELOG.md").read_text())
    assert listed is not None
    assert set(listed[1].split(" | ")) == set(_options())


def _cache_line(name: str, cache: CacheFormat) -> str:
    """A packed cache as the table of formats has it: bits per number in pages at a head size of 64, tokens in 16 bits."""
    assert cache.keys is not None
    assert cache.values is not None
    keys, values = cache.forms()
    if cache.rematerialized:
        bits = 8 * cache.keys.width(64) / 64
        made = f"made from what their projection reads, `{keys}` | the same | {bits:g} for each number that is read"
        return f"| `{name}` | {made} | {cache.sinks} | {cache.window} |"
    keys = f"`{keys}`{', before positions' if cache.before_positions else ''}"
    bits = 8 * (cache.keys.width(64) + cache.values.width(64)) / (2 * 64)
    return f"| `{name}` | {keys} | `{values}` | {bits:g} | {cache.sinks} | {cache.window} |"


@pytest.mark.parametrize("name", [name for name, cache in CACHES.items() if cache.is_packed and not cache.bits])
def test_the_table_of_caches_holds_every_one(name: str) -> None:
    assert _cache_line(name, CACHES[name]) in (ROOT / "docs" / "kv-cache.md").read_text().splitlines()


def _runnable() -> Iterator[Path]:
    return (path for path in DOCUMENTS if fences(path, "python"))


@pytest.mark.parametrize("path", _runnable(), ids=lambda path: path.name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, sharing their names; a block that cannot run here is fenced as `python no-run`."""
    monkeypatch.chdir(tmp_path)
    # Dataclasses look their module up, and torch reads the source lines of a traced model: a real module in a real file.
    (tmp_path / "shown.py").write_text("\n".join(fences(path, "python")))
    spec = importlib.util.spec_from_file_location("shown", tmp_path / "shown.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shown", module)
    spec.loader.exec_module(module)


def test_a_wrong_document_is_found() -> None:
    assert missing_paths(["passes/nothing.py", "passes/base.py", "docs/", "weights.safetensors"]) == ["passes/nothing.py"]
    assert missing_names(["qcompile.compile(x)", "qcompile.ir.graph.Graph", "qcompile.nothing"]) == ["qcompile.nothing"]
    lines = ["qcompile run OUT --prompt x", "qcompile run OUT --loud", "qcompile fly", "qcompile targets && qcompile no"]
    assert wrong_commands([*lines, "--check", "--nothing"]) == ["run OUT --loud", "fly", "no", "--nothing"]
