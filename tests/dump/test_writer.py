"""The dump as files: what is written, what is not, and that it is the same twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.dump import writer
from qcompile.dump.products import kernel_rows
from qcompile.dump.rows import record_of, record_row
from qcompile.errors import SourceError
from qcompile.ir.lowered import Entry, Kernel, KernelSpec, Plan, Step
from qcompile.ir.records import PassRecord
from qcompile.version import __version__

CHANGED = PassRecord(
    0, "canonicalize", "canonicalize", True, 10, 8, 0.25, 4096, 1e-7, exact=True, total_sqnr_db=140.0, total_kl=1e-9,
)  # fmt: skip
IDLE = PassRecord(1, "fold-constants", "fold-constants{limit=2}", False, 8, 8, 0.125, 4096)
SPEC = KernelSpec("linear", (("K", 64), ("N", 64)), ())


STEP = Step("aten.linear.default", (), {}, ("y",), {"m1": "gemm", "m64": "reference.linear"}, "linear_1")
PLAN = Plan({"forward": Entry("forward", (), (), {}, (STEP,), {})})
HEADING = {"model": "tiny", "target": "cpu-fp32", "pipeline": "canonicalize,fold-constants{limit=2}"}


def _write(directory: Path) -> None:
    writer.prepare(directory)
    writer.write_heading(directory, HEADING, complete=False)
    writer.write_diff(directory, CHANGED, "a\nb\nc\n", "a\nc\n")
    kernels = {"gemm": Kernel("gemm", SPEC, "print(1)\n"), "reference.linear": Kernel("reference.linear", SPEC, "")}
    writer.write_kernels(directory, kernel_rows(PLAN, kernels), kernels)
    writer.write_records(directory, [CHANGED, IDLE])


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_files_of_a_dump(tmp_path: Path) -> None:
    _write(tmp_path)
    assert _files(tmp_path) == ["001_canonicalize.diff", "dump.json", "kernels.json", "kernels/gemm.py", "passes.json", "pipeline.txt"]
    assert (tmp_path / "001_canonicalize.diff").read_text() == "--- before\n+++ 001_canonicalize\n@@ -1,3 +1,2 @@\n a\n-b\n c\n"
    assert json.loads((tmp_path / "dump.json").read_text()) == {"format": 1, "qcompile": __version__, "complete": False, **HEADING}
    spec = {"spec": "linear K=64 N=64", "nodes": ["linear_1"], "launches": []}
    assert json.loads((tmp_path / "kernels.json").read_text()) == [
        {"name": "gemm", "file": "kernels/gemm.py", **spec}, {"name": "reference.linear", "file": None, **spec},
    ]  # fmt: skip


def test_summary_has_every_pass(tmp_path: Path) -> None:
    _write(tmp_path)
    first, second = json.loads((tmp_path / "passes.json").read_text())
    assert first == {
        "index": 0, "name": "canonicalize", "spec": "canonicalize", "changed": True, "nodes_before": 10, "nodes_after": 8, "seconds": 0.25,
        "exact": True, "checked": True, "max_error": 1e-7, "sqnr_db": None, "kl": None, "total_sqnr_db": 140.0, "total_kl": 1e-9,
        "bytes": 4096, "listing": "001_canonicalize.txt",
    }  # fmt: skip
    assert second["max_error"] is None
    assert second["listing"] is None


def test_a_row_reads_back() -> None:
    rows = [record_row(record) for record in (CHANGED, IDLE)]
    assert [record_of(row) for row in rows] == [CHANGED, IDLE]
    older = [{key: value for key, value in row.items() if key not in ("exact", "checked", "total_sqnr_db", "total_kl")} for row in rows]
    assert [record_of(row) for row in older] == [replace(CHANGED, exact=None, total_sqnr_db=None, total_kl=None), IDLE]


def test_wider_columns_are_no_change(tmp_path: Path) -> None:
    writer.prepare(tmp_path)
    writer.write_diff(tmp_path, CHANGED, "%a = x    f32[2]\n%b = y    f32[2]\n", "%a = x       f32[2]\n%bbbb = y    f32[2]\n")
    diff = (tmp_path / "001_canonicalize.diff").read_text().splitlines()
    assert diff[3:] == [" %a = x  f32[2]", "-%b = y  f32[2]", "+%bbbb = y  f32[2]"]


def test_a_second_dump_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "kernels" / "mine.py").write_text("")
    writer.prepare(tmp_path)
    assert _files(tmp_path) == ["kernels/mine.py", "notes.md"]


def test_only_kernels_are_removed_whatever_a_dump_says(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "precious.py").write_text("")
    rows = [{"file": "../precious.py"}, {"file": "kernels/../../precious.py"}]
    (tmp_path / "dump" / "kernels.json").write_text(json.dumps(rows))
    writer.prepare(tmp_path / "dump")
    assert _files(tmp_path) == ["precious.py"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("")
    with pytest.raises(SourceError, match=r"dump .*/dump: expected a directory that can be made, got File exists; choose another"):
        writer.prepare(tmp_path / "dump")
