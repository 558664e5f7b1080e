"""A share of the onnx package's own node tests, and the table of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("onnx")

from benchmarks.onnx_node_tests import Outcome, cases, is_served, run_case, summary, table
from qcompile.frontend.onnx.registry import OWN, RULES

_ROW = re.compile(r"^\| ([^|]+) \| (yes|no|by definition) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def test_no_case_fails() -> None:
    """Every 32nd case, as a module and as a graph: right or refused by name, never wrong."""
    outcomes = [run_case(case, captured=True) for case in cases()[::32]]
    assert [item for item in outcomes if item.outcome == "failed"] == []
    served = [item for item in outcomes if is_served(item)]
    assert sum(item.outcome == "passed" for item in served) >= 0.85 * len(served), summary(outcomes)


def test_the_table_in_the_docs(root: Path) -> None:
    text = (root / "docs" / "onnx-operators.md").read_text()
    rows = {name: (rule, int(passed), int(refused), int(failed)) for name, rule, passed, refused, failed in _ROW.findall(text)}
    assert sum(row[1] + row[2] + row[3] for row in rows.values()) > 1500
    assert all(row[3] == 0 for row in rows.values()), "no wrong answers"
    served = [row for row in rows.values() if row[0] == "yes"]
    assert sum(row[1] for row in served) >= 0.85 * sum(row[1] + row[2] for row in served)
    missing = [name for domain, name in RULES if domain != OWN and not re.search(rf"\b{name}\b", text)]
    assert missing == [], "make the table again"


def test_a_wrong_answer_is_a_failure() -> None:
    (case,) = [item for item in cases("test_abs") if item.name == "test_abs"]
    inputs, outputs = case.data_sets[0]
    case.data_sets = [(inputs, [outputs[0] + 0.1])]
    outcome = run_case(case)
    assert (outcome.outcome, outcome.operator) == ("failed", "Abs")
    assert "values differ by up to 0.1" in outcome.reason


def test_the_summary_counts_operators_with_a_rule() -> None:
    outcomes = [Outcome("a", "Abs", "passed"), Outcome("b", "Abs", "refused"), Outcome("c", "Loop", "refused")]
    assert summary(outcomes) == "3 cases: 1 passed, 2 refused, 0 failed; of operators with a rule 1 of 2 (50.0 %)"
    assert "| Loop | no | 0 | 1 | 0 |" in table(outcomes)
