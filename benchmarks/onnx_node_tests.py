"""The onnx package's own node tests through the importer: a table per operator of cases passed, refused and failed.

    python benchmarks/onnx_node_tests.py --out docs/onnx-operators.md

Each case is interpreted as it is, then traced and run as a graph (`--captured N`: every Nth). A case that needs a shape, axes or
another number at run time is tried again with that input as a constant, as models have it.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.frontend.onnx.fusions import fuse
from qcompile.frontend.onnx.interpreter import OnnxModule, UnreadableInputError
from qcompile.frontend.onnx.kinds import BITS, STORED
from qcompile.frontend.onnx.load import capture_program
from qcompile.frontend.onnx.program import program_of
from qcompile.frontend.onnx.registry import MICROSOFT, RULES

# Two units in the last place: the expected value was rounded at every step, ours once.
_EPSILON = {TensorProto.FLOAT16: 2.0**-9, TensorProto.BFLOAT16: 2.0**-6}


@dataclass(frozen=True)
class Outcome:
    """What became of one case: `passed`, `refused` or `failed`, and why."""

    name: str
    operator: str
    outcome: str
    reason: str = ""


def main() -> None:
    """Run, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--captured", type=int, default=1, metavar="N", help="run every Nth case as a captured graph too (0: none)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print what was refused and why")
    options = parser.parse_args()
    outcomes = list(run_cases(options.only, options.captured))
    for item in outcomes:
        if item.outcome == "failed" or (options.verbose and item.outcome == "refused"):
            print(f"{item.outcome}: {item.name}: {item.reason}")
    text = table(outcomes)
    print(summary(outcomes))
    if options.out:
        options.out.write_text(text)


def run_cases(only: str = "", captured: int = 0) -> Iterator[Outcome]:
    """One outcome per node case of the installed onnx package."""
    for index, case in enumerate(cases(only)):
        yield run_case(case, bool(captured) and index % captured == 0)


def cases(only: str = "") -> list[Any]:
    """The node cases whose name contains `only`."""
    from onnx.backend.test import loader

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = loader.load_model_tests(kind="node")
    return [case for case in found if only in case.name]


def operator_of(case: Any) -> str:
    """The operator that a case tests: its name, or that of the operator whose definition it spells out, with `, expanded`."""
    if "_expanded" in case.name:
        return "(expanded definitions)"
    nodes = list(case.model.graph.node)
    tested = [node for node in nodes if node.op_type != "Constant"] or nodes
    # Cases of sequences make one with other operators first.
    return str(tested[-1 if case.name.startswith("test_sequence") else 0].op_type)


def run_case(case: Any, captured: bool = False) -> Outcome:
    """Run all data sets of a case, as a module and perhaps as a graph."""
    operator = operator_of(case)
    try:
        for inputs, outputs in case.data_sets:
            reason = _compare(case, inputs, outputs, captured)
            if reason:
                return Outcome(case.name, operator, "failed", reason)
    except QCompileError as error:
        return Outcome(case.name, operator, "refused", str(error))
    # Anything else is a fault of the importer, which the table is there to show.
    except Exception as error:
        return Outcome(case.name, operator, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Outcome(case.name, operator, "passed")


def _compare(case: Any, inputs: Sequence[Any], outputs: Sequence[Any], captured: bool) -> str:
    model, given = case.model, dict(zip([item.name for item in case.model.graph.input], inputs, strict=False))
    while True:
        try:
            return _run(model, given, outputs, case, captured)
        except UnreadableInputError as error:
            # What it needs may be computed from inputs: then all of them that could be sizes are constants.
            names = [error.name] if error.name in given else [name for name, value in given.items() if _is_size(value)]
            if not names:
                raise
            for name in names:
                model = with_constant(model, name, given.pop(name))


def _is_size(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind in "iu" and array.ndim <= 1


def with_constant(model: ModelProto, name: str, value: Any) -> ModelProto:
    """The model with an input as an initialiser."""
    changed = ModelProto()
    changed.CopyFrom(model)
    (item,) = [item for item in changed.graph.input if item.name == name]
    changed.graph.input.remove(item)
    tensor = numpy_helper.from_array(np.asarray(value), name)
    tensor.data_type = item.type.tensor_type.elem_type
    changed.graph.initializer.append(tensor)
    return changed


def with_input(model: ModelProto) -> ModelProto:
    """The model with an input that nothing reads, if it has none."""
    if not model.graph.input:
        model.graph.input.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1]))
    return model


def _run(model: ModelProto, given: dict[str, Any], outputs: Sequence[Any], case: Any, captured: bool) -> str:
    program = program_of(with_input(model), Path(tempfile.gettempdir()) / f"{case.name}.onnx")
    fuse(program.body)
    if any(not isinstance(value, np.ndarray | np.generic | TensorProto) for value in given.values()):
        raise QCompileError("expected tensors as inputs, got another kind of value")
    inputs = {item.name: as_tensor(given.get(item.name, np.zeros(1, np.float32)), item.kind) for item in program.inputs}
    kinds = [item.type.tensor_type.elem_type for item in model.graph.output]
    module = OnnxModule(program, load=True)
    result = module(**{module.keywords[name]: value for name, value in inputs.items()})
    reason = differences(result, outputs, kinds, case)
    if captured and not reason:
        graph = capture_program(program, inputs, {})
        results = graph(**{module.keywords[name]: value for name, value in inputs.items()})
        reason = differences(results, outputs, kinds, case)
        reason = reason and f"captured: {reason}"
    return reason


def as_tensor(value: Any, kind: int) -> Tensor:
    """A test's value as a tensor: elements of fewer than 8 bits take a byte each."""
    if kind not in STORED:
        raise QCompileError(f"expected numbers, got element type {kind}")
    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    if kind in BITS:
        return torch.from_numpy(array.astype(np.float32)).to(STORED[kind] if kind != TensorProto.FLOAT4E2M1 else torch.float32)
    if array.dtype.name.startswith(("bfloat16", "float8")):
        return torch.from_numpy(array.view(f"uint{array.dtype.itemsize * 8}").copy()).view(STORED[kind])
    return torch.from_numpy(np.array(array))


def differences(result: Any, outputs: Sequence[Any], kinds: Sequence[int], case: Any) -> str:
    """What is wrong with a result, or an empty text."""
    found = list(result.values()) if isinstance(result, dict) else [result]
    if len(found) != len(outputs):
        return f"{len(found)} outputs, expected {len(outputs)}"
    for got, wanted, kind in zip(found, outputs, kinds, strict=True):
        if not isinstance(wanted, np.ndarray | np.generic | TensorProto):
            return "expected a sequence"
        expected = as_tensor(wanted, kind)
        if tuple(got.shape) != tuple(expected.shape):
            return f"shape {list(got.shape)}, expected {list(expected.shape)}"
        half = kind in _EPSILON
        if got.dtype != (torch.float32 if half else expected.dtype):
            return f"dtype {got.dtype}, expected {expected.dtype}"
        # A result in float32 stands for one in half precision, which is rounded to it once.
        left = (got.to(expected.dtype) if half else got).to(torch.float64)
        tolerance = max(case.rtol, _EPSILON.get(kind, 0.0))
        if not torch.allclose(left, expected.to(torch.float64), rtol=tolerance, atol=max(case.atol, 1e-7), equal_nan=True):
            return f"values differ by up to {float((left - expected.to(torch.float64)).abs().nan_to_num().max()):.3g}"
    return ""


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line."""
    count = Counter(item.outcome for item in outcomes)
    served = [item for item in outcomes if is_served(item)]
    passed = sum(item.outcome == "passed" for item in served)
    share = 100 * passed / max(len(served), 1)
    return (
        f"{len(outcomes)} cases: {count['passed']} passed, {count['refused']} refused, {count['failed']} failed; "
        f"of operators with a rule {passed} of {len(served)} ({share:.1f} %)"
    )


def is_served(item: Outcome) -> bool:
    """Whether the case is of an operator that the importer has a rule for."""
    return has_rule(item.operator)


def has_rule(operator: str) -> bool:
    """Whether a standard operator is read; constants are no nodes any more when rules are looked up."""
    return operator == "Constant" or ("", operator) in RULES


def table(outcomes: Sequence[Outcome]) -> str:
    """The table as Markdown."""
    rows: dict[str, Counter[str]] = {}
    for item in outcomes:
        rows.setdefault(item.operator, Counter())[item.outcome] += 1
    lines = [
        "# ONNX operators that are read",
        "",
        f"Made by `python benchmarks/onnx_node_tests.py --out docs/onnx-operators.md` with onnx {onnx.__version__}: the package's own",
        "node tests through the importer, interpreted and traced. A case is passed, refused by name, or failed (a wrong answer:",
        "there must be none). Shapes, axes and other numbers that a model keeps as constants are constants here too. An operator",
        "without a rule is refused by name, unless the standard defines it by operators that have one. Expanded definitions are cases of",
        "that kind which the package spells out itself.",
        "",
        f"{summary(outcomes)}.",
        "",
        "| operator | rule | passed | refused | failed |",
        "|---|---|---:|---:|---:|",
    ]
    for operator in sorted(rows, key=lambda name: (name.startswith("("), name)):
        row = rows[operator]
        known = "yes" if has_rule(operator) else "by definition" if row["passed"] else "no"
        lines.append(f"| {operator} | {known} | {row['passed']} | {row['refused']} | {row['failed']} |")
    untested = sorted(name for domain, name in RULES if not domain and name not in rows)
    microsoft = sorted(name for domain, name in RULES if domain == MICROSOFT)
    lines += ["", f"With a rule and without a case of their own: {', '.join(untested)}.", ""]
    lines += [f"Of the domain com.microsoft: {', '.join(microsoft)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
