"""Every example runs; what the example pass claims holds on a language model too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qcompile
from qcompile.passes.base import Pass
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.target import parse_target
from tests.models import tiny

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS_A_MODEL = {"demo"}
"""Examples that read a checkpoint: here they only explain themselves."""


def load_example(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_example(name).main
    if name in NEEDS_A_MODEL:
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
    else:
        main()
    assert capsys.readouterr().out.strip()


def test_custom_pass_shows_its_diff_and_changes_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("custom_pass").main()
    shown = capsys.readouterr().out
    assert "+%linear_6 = aten.linear(%x, %query_weight_key_weight_value_weight, %query_bias_key_bias_value_bias)  fp32[B, 8, 192]" in shown
    assert "merge-siblings" in shown
    difference = shown.rsplit(": ", maxsplit=1)[1]
    assert float(difference) < 1e-6


def test_requests_that_join_and_leave_are_answered_as_alone(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("continuous_batch").main()
    assert "the same tokens as alone: True" in capsys.readouterr().out


def _pipeline(target: str, **options: int) -> list[Pass]:
    step: Pass = load_example("custom_pass").MergeSiblings(**options)
    return insert(default_pipeline(parse_target(target)), step, before="convert-dtype")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_siblings_of_a_language_model_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Of seven linears in a layer, three and two become one each; qwen2 has biases on the three. The head has nothing to join."""
    model, prompts = tiny(family), [[3, 14, 15, 92], [65, 35]]
    plain = qcompile.compile(model, "cpu-int4", recipe="nearest", max_batch=2, max_context=32)
    merged = qcompile.compile(model, "cpu-int4", max_batch=2, max_context=32, passes=_pipeline("cpu-int4"), check=True)
    merged.save(tmp_path / "artifact")
    loaded = qcompile.load(tmp_path / "artifact", max_batch=2, max_context=32)
    expected = plain.generate(prompts, max_new_tokens=8, ignore_eos=True)
    assert loaded.generate(prompts, max_new_tokens=8, ignore_eos=True) == expected
    count = [len(item.graph.calls(torch.ops.qcompile.quantized_linear.default)) for item in (plain, merged)]
    assert count == [2 * 7 + 1, 2 * 4 + 1]
    assert merged.weight_bytes == plain.weight_bytes


def test_merging_leaves_ignored_weights_and_small_groups_alone() -> None:
    model, x = load_example("custom_pass").Block(64).eval(), torch.randn(1, 4, 64)
    pipeline = _pipeline("cpu-int4")
    ignored = qcompile.compile(model, "cpu-int4", example_inputs=x, passes=pipeline, ignore=["query", "gate"])
    assert {"key.weight+value.weight.codes", "query.weight", "gate.weight"} <= set(ignored.graph.constants)
    large = qcompile.compile(model, "cpu-int4", example_inputs=x, passes=_pipeline("cpu-int4", least=3))
    assert {"query.weight+key.weight+value.weight.codes", "gate.weight.codes"} <= set(large.graph.constants)
