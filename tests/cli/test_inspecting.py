"""`qcompile inspect` of dumps and nodes, `qcompile diff` and what it tells the shell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile

Invoke = Callable[..., Any]


class _Gate(nn.Module):
    """Two linears and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * nn.functional.silu(self.gate(x))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact and the dump of one compilation, and the dump of another with smaller groups."""
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    model, x = _Gate(), torch.randn(2, 64)
    for name, size in (("dump", 64), ("finer", 16)):
        made = qcompile.compile(
            model, "cpu-int4", recipe="nearest", example_inputs=x, dump=folder / name, group_size=size, engine="torch_cpu"
        )
    del made
    qcompile.compile(model, "cpu-int4", recipe="nearest", example_inputs=x, group_size=64, engine="torch_cpu").save(folder / "artifact")
    return folder


def test_a_dump_and_an_artifact_tell_the_same(compiled: Path, invoke: Invoke) -> None:
    dump, artifact = (json.loads(invoke("inspect", compiled / name, "--json").stdout) for name in ("dump", "artifact"))
    assert (dump["kind"], artifact["kind"]) == ("dump", "artifact")
    for key in ("model", "target", "pipeline", "complete", "weight_bytes", "bits_per_weight", "arena_bytes", "coverage", "cache", "matmul"):
        assert dump[key] == artifact[key], key
    assert [row["name"] for row in dump["kernels"]] == [row["name"] for row in artifact["kernels"]]
    kinds = {(row["kind"], row["name"]) for row in dump["distributions"]}
    assert kinds == {("weight", "up.weight"), ("weight", "gate.weight")}
    assert artifact["distributions"] is None


def test_tables_of_a_dump(compiled: Path, invoke: Invoke) -> None:
    text = invoke("inspect", compiled / "dump").stdout
    for title in ("passes of", "distributions", "coverage", "bits per weight"):
        assert title in text
    row = next(line for line in text.splitlines() if "up.weight" in line)
    assert "quantize-weights" in row


def test_a_node_tells_where_it_comes_from(compiled: Path, invoke: Invoke) -> None:
    found = json.loads(invoke("inspect", compiled / "dump", "--node", "gated_activation", "--json").stdout)
    assert found["node"]["source"].startswith("test_inspecting.py:")
    assert sorted(origin.split()[-2] for origin in found["node"]["origins"]) == ["aten.mul.Tensor", "aten.silu"]
    assert found["node"]["passes"] == ["raise-patterns"]
    assert [row["name"] for row in found["kernels"]] == ["torch_cpu.gated_activation"]
    assert [(step["listing"].partition("_")[2], step["what"]) for step in found["life"]] == [
        ("raise-patterns", "made"), ("fuse-dequantize", "changed"),
    ]  # fmt: skip
    gone = json.loads(invoke("inspect", compiled / "dump", "--node", "%silu", "--json").stdout)
    assert gone["life"][-1] | {"listing": ""} == {"listing": "", "what": "gone", "successors": ["gated_activation"]}
    assert "raise-patterns" in invoke("inspect", compiled / "dump", "--node", "silu").stdout


@pytest.mark.parametrize("name", ["dump", "artifact"])
def test_a_constant_tells_what_was_done_to_it(compiled: Path, invoke: Invoke, name: str) -> None:
    found = json.loads(invoke("inspect", compiled / name, "--node", "up.weight.codes", "--json").stdout)
    assert found["node"]["log"] == ["quantize(int4 g64 sym fp16).codes"]
    assert [row["name"] for row in found["kernels"]] == ["torch_cpu.quantized_linear"]
    assert len(found["readers"]) == 1


def test_a_node_that_is_not_there_is_named_with_others(compiled: Path, invoke: Invoke) -> None:
    result = invoke("inspect", compiled / "dump", "--node", "up.wieght.codes")
    assert result.exit_code == 2
    assert "dump: expected a node or constant of the graph, got 'up.wieght.codes'; did you mean up.weight.codes" in result.stderr


def test_diff_of_equals_is_nothing_and_0(compiled: Path, invoke: Invoke) -> None:
    result = invoke("diff", compiled / "dump", compiled / "artifact")
    assert (result.exit_code, result.stdout) == (0, "no difference\n"), result.stderr


def test_diff_fails_on_a_regression(compiled: Path, invoke: Invoke) -> None:
    result = invoke("diff", compiled / "dump", compiled / "finer")
    assert result.exit_code == 1
    assert "regression: bits per weight: 4.25 -> 5 (+17.6 %), allowed +2 %" in result.stdout
    assert "int4 g16" in result.stdout
    assert invoke("diff", compiled / "finer", compiled / "dump").exit_code == 0
    assert invoke("diff", compiled / "dump", compiled / "finer", "--max-size-growth", "0.3").exit_code == 0
    values = json.loads(invoke("diff", compiled / "dump", compiled / "finer", "--max-size-growth", "off", "--json").stdout)
    assert values["sizes"]["bits_per_weight"] == {"before": 4.25, "after": 5.0}
    assert values["regressions"] == []


def test_diff_compares_speed_where_it_was_measured(compiled: Path, invoke: Invoke, tmp_path: Path) -> None:
    slower = Path(shutil.copytree(compiled / "dump", tmp_path / "slower"))
    for path, speed in ((compiled / "dump", 50.0), (slower, 40.0)):
        (path / "bench.json").write_text(json.dumps({"decode_tokens_per_second": speed}))
    result = invoke("diff", compiled / "dump", slower)
    assert (result.exit_code, "decode tokens per second: 50 -> 40 (-20.0 %), allowed -10 %" in result.stdout) == (1, True)
    assert invoke("diff", compiled / "dump", slower, "--max-slowdown", "25%").exit_code == 0
    (compiled / "dump" / "bench.json").unlink()


@pytest.mark.parametrize("text", ["-1%", "nan", "2 percent", ""])
def test_a_limit_that_is_none_is_bad_input(compiled: Path, invoke: Invoke, text: str) -> None:
    result = invoke("diff", compiled / "dump", compiled / "dump", f"--max-size-growth={text}")
    assert (result.exit_code, result.stderr) == (2, f"error: {text!r}: expected a share such as 2% or 0.02, or off\n")


def test_diff_of_what_is_no_dump_is_bad_input(compiled: Path, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("diff", compiled / "dump", tmp_path).exit_code == 2
    heading = json.loads((compiled / "dump" / "dump.json").read_text())
    partial = Path(shutil.copytree(compiled / "dump", tmp_path / "partial"))
    (partial / "dump.json").write_text(json.dumps(heading | {"complete": False}))
    result = invoke("diff", compiled / "dump", partial)
    assert result.exit_code == 2
    assert "expected a complete dump, got one that was interrupted after pass" in result.stderr
    assert "interrupted after pass" in invoke("inspect", partial).stdout.replace("\n", " ")
