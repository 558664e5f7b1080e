"""`qcompile replay` and `qcompile bisect`: what they print and exit with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.errors import NumericError
from qcompile.frontend import load
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext, parse_pipeline
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import registry
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.faults import FAULTS, BrokenFusion

Invoke = Callable[..., Any]
OWN = ("--import", "tests.passes.faults")
FRONT = "canonicalize,raise-patterns,fold-constants,remove-dead-code"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reproducer of a broken fusion."""
    folder = tmp_path_factory.mktemp("reproducers")
    steps = parse_pipeline(f"{FRONT},broken-fusion", registry() | FAULTS)
    with pytest.raises(NumericError, match=BrokenFusion.name) as caught:
        run_pipeline(load(tiny("llama")).graph, steps, PassContext(parse_target("cpu-fp32")), check=NumericCheck(reproducers=folder))
    return Path(caught.value.reproducer)


def test_replay_exits_with_1_while_the_pass_is_wrong_and_0_once_it_is_not(file: Path, invoke: Invoke) -> None:
    wrong = invoke("replay", file, *OWN)
    assert wrong.exit_code == 1
    assert "Still wrong: broken-fusion: expected the same function within 1e-09" in wrong.stdout
    assert "add_rms_norm_2" in wrong.stdout
    told = invoke("replay", file, "--import", "tests.passes.faults:BrokenFusion", "--json")
    assert told.exit_code == 1
    values = json.loads(told.stdout)
    assert (values["fails"], values["pass"], values["place"]["node"]) == (True, "broken-fusion", "add_rms_norm_2")
    assert [operand["state"] for operand in values["place"]["operands"]] == ["new", "as before", "as before"]
    right = invoke("replay", file, "--pass", "fuse-residual-norm")
    assert right.exit_code == 0
    assert "Nothing is wrong any more." in right.stdout


@pytest.mark.parametrize(("options", "message"), [
    ((), "unknown pass 'broken-fusion'"),
    (("--import", "no.such.module"), "--import no.such.module: expected a module that can be imported"),
    (("--import", "tests.passes.faults:Missing"), "expected Missing in the module tests.passes.faults, got none"),
])  # fmt: skip
def test_replay_names_what_it_does_not_know(file: Path, invoke: Invoke, options: tuple[str, ...], message: str) -> None:
    result = invoke("replay", file, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_bisect_names_the_pass_and_the_rewrite(directory: Path, invoke: Invoke) -> None:
    steps = ("--passes", f"{FRONT},wrong-scale,fuse-residual-norm", *OWN)
    found = invoke("bisect", directory, "-t", "cpu-int4", *steps, "--kl-above", "0.1", "--json")
    assert found.exit_code == 1, found.stderr
    values = json.loads(found.stdout)
    assert (values["found"], values["pass"], values["rewrite"]["number"]) == (True, "wrong-scale", 13)
    assert values["rewrite"]["node"] == "dequantize_12"
    shown = invoke("bisect", directory, "-t", "cpu-int4", *steps, "--fails-check")
    assert shown.exit_code == 1
    assert "13 of 15" in shown.stdout
    assert "quantize" in shown.stdout
    fine = invoke("bisect", directory, "-t", "cpu-int4", "--recipe", "nearest", "--passes", FRONT, "--error-above", "1e-4")
    assert fine.exit_code == 0
    assert "None of 4 passes is bad." in fine.stdout


def has_no_fused_norm(graph: Graph) -> bool:
    """A predicate for the test below."""
    return not graph.calls(torch.ops.qcompile.add_rms_norm.default)


def test_bisect_asks_a_function_or_a_command(directory: Path, invoke: Invoke) -> None:
    common = ("bisect", directory, "-t", "cpu-fp32", "--passes", f"{FRONT},fuse-residual-norm", "--json")
    for option in (
        ("--predicate", f"python:{__name__}:has_no_fused_norm"),
        ("--command", 'sh -c "! grep -q add_rms_norm $0" {}'),
    ):
        result = invoke(*common, *option)
        assert result.exit_code == 1, result.stderr
        values = json.loads(result.stdout)
        assert (values["pass"], values["rewrite"]["number"], values["rewrite"]["of"]) == ("fuse-residual-norm", 1, 4)


@pytest.mark.parametrize(("options", "message"), [
    ((), "expected one of --predicate, --command, --kl-above, --error-above and --fails-check, got 0 of them"),
    (("--fails-check", "--kl-above", "1"), "got 2 of them"),
    (("--predicate", "nothing"), "expected python:module:function, got no colon"),
    (("--predicate", "python:json:nothing"), "expected python:module:function, got no such function"),
    (("--command", "true"), "expected {} where the file's name belongs"),
    (("--command", "/no/such/command {}"), "expected a command that can be run"),
    (("--command", "false {}"), "expected a predicate that holds before the first pass"),
])  # fmt: skip
def test_bisect_refuses_predicates_that_are_none(directory: Path, invoke: Invoke, options: tuple[str, ...], message: str) -> None:
    result = invoke("bisect", directory, "-t", "cpu-fp32", "--passes", "canonicalize", *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
