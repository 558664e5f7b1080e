"""What tables show."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from qcompile.dump import tables
from qcompile.ir.records import CoverageRow, PassRecord

ROWS = [
    CoverageRow("linear_1", "linear", "q.weight", "int4 g64 sym fp16", "torch_cpu.linear", "", "m.py:1"),
    CoverageRow("linear_2", "linear", "k.weight", "int4 g64 sym fp16", "torch_cpu.linear", "", "m.py:2"),
    CoverageRow("linear_3", "linear", "head.weight", "fp32", "torch_cpu.linear", "the output head", "m.py:3", chosen=True),
]


def _text(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_pass_table_shows_change_nodes_and_error() -> None:
    records = [PassRecord(0, "one", "one", True, 10, 8, 0.25, 98_300_000, 2.5e-7), PassRecord(1, "two", "two", False, 8, 8, 0.5, 0)]
    first, second = (line for line in _text(tables.pass_table(records)).splitlines() if "one" in line or "two" in line)
    assert [cell.strip() for cell in first.split("│")[1:-1]] == ["one", "yes", "0.25 s", "8 (-2)", "98.3 MB", "2.5e-07"]
    assert [cell.strip() for cell in second.split("│")[1:-1]] == ["two", "no", "0.50 s", "8", "0 B", ""]


def test_coverage_groups_what_was_treated_alike() -> None:
    lines = [line for line in _text(tables.coverage_table(ROWS)).splitlines() if "linear" in line]
    assert [[cell.strip() for cell in line.split("│")[1:-1]][-2:] for line in lines] == [["2", "q.weight"], ["1", "head.weight"]]


def test_coverage_rows_are_whole() -> None:
    assert tables.coverage_rows(ROWS)[2]["chosen"] is True
    assert tables.left_alone(ROWS) == {"the output head": 1}


def test_value_table_shortens_floats() -> None:
    assert "0.3333" in _text(tables.value_table({"kl": 1 / 3}))


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (98_345_678, "98.3 MB"), (999_700_000, "1 GB")])
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert tables.format_bytes(count) == text
