"""The dump as files: what is written, what is not, and that it is the same twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.dump import writer
from qcompile.errors import SourceError
from qcompile.ir.lowered import Kernel, KernelSpec
from qcompile.ir.records import PassRecord

CHANGED = PassRecord(0, "canonicalize", "canonicalize", True, 10, 8, 0.25, 4096, 1e-7, exact=True, total_kl=0.5)
IDLE = PassRecord(1, "fold-constants", "fold-constants{limit=2}", False, 8, 8, 0.125, 4096)
SPEC = KernelSpec("linear", (("K", 64), ("N", 64)), ())


def _write(directory: Path) -> None:
    writer.prepare(directory)
    writer.write_pass(directory, CHANGED, "a\nb\nc\n", "a\nc\n")
    writer.write_pass(directory, IDLE, "a\nc\n", "a\nc\n")
    kernels = {"gemm": Kernel("gemm", SPEC, "print(1)\n"), "reference.linear": Kernel("reference.linear", SPEC, "")}
    writer.write_summary(directory, "canonicalize,fold-constants{limit=2}", [CHANGED, IDLE], kernels)


def test_only_what_changed_has_a_listing(tmp_path: Path) -> None:
    _write(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["001_canonicalize.diff", "001_canonicalize.txt", "kernels/gemm.py", "passes.json", "pipeline.txt"]
    assert (tmp_path / "001_canonicalize.diff").read_text() == "--- before\n+++ 001_canonicalize\n@@ -1,3 +1,2 @@\n a\n-b\n c\n"


def test_summary_has_every_pass(tmp_path: Path) -> None:
    _write(tmp_path)
    first, second = json.loads((tmp_path / "passes.json").read_text())
    assert first == {
        "index": 0, "name": "canonicalize", "spec": "canonicalize", "changed": True, "nodes_before": 10, "nodes_after": 8, "seconds": 0.25,
        "exact": True, "checked": True, "max_error": 1e-7, "sqnr_db": None, "kl": None, "total_sqnr_db": None, "total_kl": 0.5,
        "bytes": 4096, "listing": "001_canonicalize.txt",
    }  # fmt: skip
    assert second["max_error"] is None
    assert second["listing"] is None


def test_summary_reads_back(tmp_path: Path) -> None:
    _write(tmp_path)
    assert writer.read_summary(tmp_path) == ("canonicalize,fold-constants{limit=2}", [CHANGED, IDLE])
    rows = json.loads((tmp_path / "passes.json").read_text())
    older = [{key: value for key, value in row.items() if key not in ("exact", "checked", "total_kl")} for row in rows]
    (tmp_path / "passes.json").write_text(json.dumps(older))
    assert writer.read_summary(tmp_path)[1] == [replace(CHANGED, exact=None, total_kl=None), IDLE]


def test_wider_columns_are_no_change(tmp_path: Path) -> None:
    writer.prepare(tmp_path)
    writer.write_pass(tmp_path, CHANGED, "%a = x    f32[2]\n%b = y    f32[2]\n", "%a = x       f32[2]\n%bbbb = y    f32[2]\n")
    diff = (tmp_path / "001_canonicalize.diff").read_text().splitlines()
    assert diff[3:] == [" %a = x  f32[2]", "-%b = y  f32[2]", "+%bbbb = y  f32[2]"]


def test_a_second_dump_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    writer.prepare(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.md"]


def test_kernels_of_someone_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "mine.py").write_text("")
    writer.prepare(tmp_path)
    assert (tmp_path / "kernels" / "mine.py").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("")
    with pytest.raises(SourceError, match=r"dump .*/dump: expected a directory that can be made, got File exists; choose another"):
        writer.prepare(tmp_path / "dump")


def test_no_dump_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected a dump \(passes.json, pipeline.txt\), got No such file .*; see --dump"):
        writer.read_summary(tmp_path)


@pytest.mark.parametrize("text", ["{", "[{}]", "[3]"])
def test_a_damaged_dump_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "passes.json").write_text(text)
    (tmp_path / "pipeline.txt").write_text("\n")
    with pytest.raises(SourceError, match=r"passes.json: expected the records of a dump, got .*; write it anew"):
        writer.read_summary(tmp_path)
