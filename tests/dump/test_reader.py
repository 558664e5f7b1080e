"""Dumps that are none, of another version, interrupted or damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import qcompile
from qcompile.dump.facts import facts_of_dump
from qcompile.dump.reader import Dump, is_dump
from qcompile.errors import PassError, SourceError
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.raise_patterns import RaisePatterns


@pytest.fixture
def copied(dumped: Path, tmp_path: Path) -> Path:
    """A dump to be damaged."""
    return Path(shutil.copytree(dumped, tmp_path / "copy"))


@dataclass(frozen=True)
class _Failing(Pass):
    name: ClassVar[str] = "failing"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        raise ValueError("oops")


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The dump of a compilation whose third pass failed."""
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    with pytest.raises(PassError, match="failing: failed with ValueError: oops"):
        qcompile.compile(
            model,
            "cpu-fp32",
            example_inputs=torch.randn(2, 8),
            passes=[Canonicalize(), RaisePatterns(), _Failing()],
            dump=tmp_path / "d",
            engine="torch_cpu",
        )
    return tmp_path / "d"


def test_what_is_no_dump_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"file: expected the directory of a dump, got a file; give the one that --dump"):
        Dump.open(tmp_path / "file")
    with pytest.raises(SourceError, match=r"nowhere: expected the directory of a dump, got nothing"):
        Dump.open(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"expected a dump, got a directory without dump.json; give the one that --dump"):
        Dump.open(tmp_path)
    assert not is_dump(tmp_path)


def test_an_older_and_another_format_are_named(copied: Path) -> None:
    heading = json.loads((copied / "dump.json").read_text())
    (copied / "dump.json").write_text(json.dumps(heading | {"format": 2, "qcompile": "9.0"}))
    with pytest.raises(SourceError, match=r"copy: expected a dump of format 1, got format 2 \(written by qcompile 9.0\); compile again"):
        Dump.open(copied)
    (copied / "dump.json").unlink()
    assert is_dump(copied)
    with pytest.raises(SourceError, match=r"expected a dump, got one of a version that wrote no dump.json; compile again"):
        Dump.open(copied)


@pytest.mark.parametrize(("text", "what"), [("{", "JSONDecodeError"), ("[]", "got list"), ('{"format": 1}', "KeyError")])
def test_a_damaged_heading_is_named(copied: Path, text: str, what: str) -> None:
    (copied / "dump.json").write_text(text)
    with pytest.raises(SourceError, match=rf"copy/dump.json: .*{what}.*; write (the dump|it) anew"):
        Dump.open(copied)


def test_an_interrupted_dump_says_how_far_it_came(interrupted: Path) -> None:
    dump = Dump.open(interrupted)
    assert not dump.complete
    assert dump.heading.pipeline == "canonicalize,raise-patterns,failing"
    assert [row["name"] for row in dump.passes] == ["canonicalize", "raise-patterns"]
    assert dump.listings[-1].nodes[-1]["op"] == "output"
    with pytest.raises(SourceError, match=r"coverage.json: expected a complete dump, got one that was interrupted after pass 1 "):
        _ = dump.coverage
    facts = facts_of_dump(interrupted)
    assert facts.interruption.startswith("after pass 1 (raise-patterns); listings, diffs, passes.json and graphs.jsonl up to there")
    assert facts.to_dict()["complete"] is False


def test_a_dump_that_broke_off_before_the_first_pass(interrupted: Path) -> None:
    (interrupted / "passes.json").unlink()
    (interrupted / "graphs.jsonl").write_text('{"listing": "000_inp')
    dump = Dump.open(interrupted)
    assert (dump.passes, dump.listings) == ([], [])
    assert dump.interruption.startswith("before the first pass was done")


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("passes.json", "[3]", r"expected a list of objects with index, name, spec"),
        ("coverage.json", '[{"node": 1}]', r"expected a list of objects with node, operator"),
        ("notes.json", "{}", r"expected a list of objects with pass, node, reason, chosen, got one with nothing"),
        ("sizes.json", '{"target": ""}', r"expected an object with target, weight_bytes"),
        ("kernels.json", "not json", r"damaged: .*JSONDecodeError"),
        ("distributions.json", "null", r"expected an object with weights, activations, got NoneType"),
        ("cache.json", None, r"expected a file of the dump, got No such file"),
    ],
)
def test_a_damaged_file_is_named(copied: Path, name: str, text: str | None, what: str) -> None:
    if text is None:
        (copied / name).unlink()
    else:
        (copied / name).write_text(text)
    dump = Dump.open(copied)
    with pytest.raises(SourceError, match=rf"copy/{name}: {what}.*; write the dump anew"):
        getattr(dump, name.removesuffix(".json"))


def test_facts_of_a_damaged_row_are_named(copied: Path) -> None:
    rows = json.loads((copied / "coverage.json").read_text())
    (copied / "coverage.json").write_text(json.dumps([rows[0] | {"colour": "red"}]))
    with pytest.raises(SourceError, match=r"coverage.json: damaged: .*colour.*; write the dump anew"):
        facts_of_dump(copied)


def test_graphs_that_break_off_are_named(copied: Path) -> None:
    file = copied / "graphs.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(SourceError, match=r"graphs.jsonl: expected whole lines, got one that breaks off after \d; write the dump anew"):
        _ = Dump.open(copied).listings
    first, _, *rest = text.splitlines(keepends=True)
    file.write_text("".join([first, *rest]))
    with pytest.raises(SourceError, match=r"graphs.jsonl line \d: damaged: expected what a dump holds there, got KeyError"):
        _ = Dump.open(copied).listings


def test_a_kernel_outside_the_dump_is_not_read(copied: Path) -> None:
    dump = Dump.open(copied)
    with pytest.raises(SourceError, match=r"kernels.json: expected a file in kernels/, got '../../secret.py'; do not trust this dump"):
        dump.kernel_source({"file": "../../secret.py"})
    assert dump.blame is None
