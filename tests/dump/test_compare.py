"""Two compilations side by side: what differs, and what counts as worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompile.dump.compare import Limits, compare, source_diff
from qcompile.dump.compare_tables import comparison_tables
from qcompile.dump.facts import Facts, measured, read_figures
from qcompile.dump.tables import written
from qcompile.errors import SourceError
from qcompile.ir.records import CoverageRow
from qcompile.runtime.cache_layers import CacheLayer


def _pass(index: int, name: str, **values: Any) -> dict[str, Any]:
    plain = {"spec": name, "changed": True, "nodes_after": 10, "bytes": 1000, "max_error": None, "sqnr_db": None, "kl": None}
    return {"index": index, "name": name, "nodes_before": 10, "seconds": 0.1 * index, **plain, **values}


def _kernel(name: str, registers: int = 40) -> dict[str, Any]:
    launch = {"function": "f", "registers": registers, "shared_bytes": 2048, "num_warps": 4, "num_stages": 1}
    return {"name": name, "spec": "linear K=64 N=64", "file": f"kernels/{name}.py", "nodes": ["linear_1"], "launches": [launch]}


LAYER = CacheLayer(0, "int4 t32 asym", "int4 g32 asym", 4, 32, 384, 240, 51456, 0, "attend_settled")
FACTS = Facts(
    Path("a"), "dump", "m", "sm90-int4", "canonicalize,round", "",
    [_pass(0, "canonicalize", max_error=1e-15), _pass(1, "round", max_error=0.1, sqnr_db=20.0, kl=0.01)],
    [
        CoverageRow("linear_1", "linear", "q.weight", "int4 g64", "linear_0a", "", "m.py:1"),
        CoverageRow("add", "attention", "", "f", "k", "", ""),
    ],
    [LAYER], {"target": "sm90-int4", "weight_bytes": 1000, "bits_per_weight": 4.25, "kv_bytes_per_token": 0},
    [_kernel("linear_0a")], {"linear_0a": "a = 1\nb = 2\nc = 3\n"}, [], None, {"kl": 0.02, "decode_tokens_per_second": 100.0},
)  # fmt: skip


def _round(facts: Facts, **values: Any) -> Facts:
    return replace(facts, passes=[facts.passes[0], facts.passes[1] | values])


def _sizes(facts: Facts, **values: Any) -> Facts:
    return replace(facts, sizes={**facts.sizes, **values})


def _figures(facts: Facts, **values: float) -> Facts:
    return replace(facts, figures={**facts.figures, **values})


def _left_alone(facts: Facts, *, chosen: bool) -> Facts:
    return replace(facts, coverage=[replace(facts.coverage[0], reason="K = 63 is odd", chosen=chosen), *facts.coverage[1:]])


def test_what_is_equal_is_left_out() -> None:
    found = compare(FACTS, replace(FACTS, path=Path("b"), passes=[row | {"seconds": 9.0} for row in FACTS.passes]))
    assert found.is_empty
    assert not found.regressions
    assert written(comparison_tables(found)).strip() == "no difference"


@pytest.mark.parametrize(
    ("worse", "line", "off"),
    [
        (lambda f: _sizes(f, weight_bytes=1030), "weight bytes: 1 kB -> 1.03 kB (+3.0 %), allowed +2 %", {"size": 0.04}),
        (lambda f: _sizes(f, bits_per_weight=4.5), "bits per weight: 4.25 -> 4.5 (+5.9 %), allowed +2 %", {"size": math.inf}),
        (lambda f: _sizes(f, kv_bytes_per_token=8), "kv bytes per token: 0 B -> 8 B (from nothing), allowed +2 %", {"size": math.inf}),
        (lambda f: _round(f, max_error=0.2), "round: max_error 0.1 -> 0.2 (error +100.0 %), allowed +10 %", {"error": 1.01}),
        (lambda f: _round(f, sqnr_db=18.0), "round: sqnr_db 20 -> 18 (error +25.9 %), allowed +10 %", {"error": 0.26}),
        (lambda f: _round(f, kl=0.012), "round: kl 0.01 -> 0.012 (error +20.0 %), allowed +10 %", {"error": 0.21}),
        (lambda f: _figures(f, kl=0.03), "kl: 0.02 -> 0.03 (+50.0 %), allowed +10 %", {"error": 0.51}),
        (
            lambda f: _figures(f, decode_tokens_per_second=89.0),
            "decode tokens per second: 100 -> 89 (-11.0 %), allowed -10 %",
            {"speed": 0.12},
        ),
        (lambda f: _left_alone(f, chosen=False), "newly left alone: 1, such as q.weight: K = 63 is odd; allowed 0", {"left_alone": 1}),
    ],
)
def test_what_is_worse_is_a_regression_beyond_its_limit(worse: Callable[[Facts], Facts], line: str, off: dict[str, float]) -> None:
    after = worse(FACTS)
    assert list(compare(FACTS, after).regressions) == [line]
    assert not compare(FACTS, after, Limits(**off)).regressions
    assert not compare(after, FACTS).regressions, "the other way round it is an improvement"
    assert not compare(FACTS, after).is_empty


@pytest.mark.parametrize(
    "alike",
    [
        lambda f: _sizes(f, weight_bytes=1019),
        lambda f: _left_alone(f, chosen=True),
        lambda f: replace(f, passes=[f.passes[0] | {"max_error": 9e-10}, f.passes[1]]),
    ],
)
def test_what_is_within_limits_is_shown_and_no_regression(alike: Callable[[Facts], Facts]) -> None:
    found = compare(FACTS, alike(FACTS))
    assert not found.is_empty
    assert not found.regressions


def test_an_absolute_limit_of_the_kl() -> None:
    assert list(compare(FACTS, FACTS, Limits(kl=0.015)).regressions) == ["kl: 0.02, allowed 0.015"]
    assert not compare(FACTS, FACTS, Limits(kl=0.02)).regressions
    with pytest.raises(SourceError, match=r"b: --max-kl: expected the KL of the result, got none; compile with --check, or .*"):
        compare(FACTS, replace(FACTS, path=Path("b"), figures={}), Limits(kl=0.015))


def test_the_kl_of_a_check_counts_where_nothing_better_was_measured(tmp_path: Path) -> None:
    rows = [_pass(0, "a", total_kl=0.03), _pass(1, "b", total_kl=0.04), _pass(2, "c", total_kl=None)]
    assert measured(tmp_path, rows) == {"checked_kl": 0.04}
    checked = replace(FACTS, figures={"checked_kl": 0.04})
    assert list(compare(FACTS, checked, Limits(kl=0.03)).regressions) == ["kl: 0.04, allowed 0.03"]
    worse = replace(checked, figures={"checked_kl": 0.05})
    assert list(compare(checked, worse).regressions) == ["checked kl: 0.04 -> 0.05 (+25.0 %), allowed +10 %"]


def test_passes_are_paired_by_name_and_counts_are_told_once() -> None:
    first, second = FACTS.passes
    moved = [first, _pass(1, "fold", nodes_after=8), second | {"index": 2, "spec": "round{a=1}", "nodes_after": 8, "bytes": 900}]
    last = _pass(3, "late", nodes_after=8, bytes=900)
    before = replace(FACTS, passes=[*FACTS.passes, _pass(2, "late")])
    rows = compare(before, replace(FACTS, passes=[*moved, last])).passes
    assert [(row["name"], row["only"]) for row in rows] == [("fold", "after"), ("round", "")], "late differs by what was there before"
    assert rows[1]["changes"] == {"spec": ("round", "round{a=1}"), "nodes_after": (10, 8), "bytes": (1000, 900)}


def test_formats_are_compared_by_weight() -> None:
    other = replace(FACTS.coverage[0], node="linear_7", format="int8 g64", activation="int8 token", operator="integer_linear")
    (row,) = compare(FACTS, replace(FACTS, coverage=[FACTS.coverage[1], other])).formats
    assert (row["before"], row["after"]) == ("int4 g64 by linear", "int8 g64 x int8 token by integer_linear")
    assert (row["operator"], row["count"], row["names"]) == ("integer_linear", 1, ["q.weight"])


def test_kernels_are_compared_by_what_they_implement() -> None:
    after = replace(FACTS, kernels=[_kernel("linear_ff", registers=64)], sources={"linear_ff": "a = 1\nb = 3\nc = 3\n"})
    (row,) = compare(FACTS, after).kernels
    assert row["diff"].splitlines() == ["--- before", "+++ after", "@@ -1,3 +1,3 @@", " a = 1", "-b = 2", "+b = 3", " c = 3"]
    text = written(comparison_tables(compare(FACTS, after)))
    assert "registers" in text
    assert "+b = 3" in text
    (gone,) = compare(FACTS, replace(FACTS, kernels=[], sources={})).kernels
    assert (gone["only"], gone["diff"]) == ("before", "")
    assert source_diff("a\n", "a\n") == ""


def test_caches_are_compared_layer_by_layer() -> None:
    found = compare(FACTS, replace(FACTS, cache=[replace(LAYER, keys="int2 t32 asym")]))
    assert found.cache == {"0": {"keys": ("int4 t32 asym", "int2 t32 asym")}}
    assert "int2 t32 asym" in written(comparison_tables(found))


def test_an_interrupted_dump_is_not_compared() -> None:
    with pytest.raises(SourceError, match=r"b: diff: expected a complete dump, got one that was interrupted after pass 3"):
        compare(FACTS, replace(FACTS, path=Path("b"), interruption="after pass 3"))


def test_figures_are_those_that_commands_print(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"target": "cpu-int4", "decode_tokens_per_second": 31.5, "weight_bytes": 4, "tokens": 3}')
    (tmp_path / "eval.json").write_text('{"kl": 0.05, "perplexity": 12}')
    assert read_figures(tmp_path) == {"decode_tokens_per_second": 31.5, "kl": 0.05, "perplexity": 12.0}
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(SourceError, match=r"eval.json: expected what a command printed with --json, got .*; write it anew"):
        read_figures(tmp_path)
