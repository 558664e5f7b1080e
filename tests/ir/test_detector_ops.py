"""Boxes that stay and regions of images, beside onnxruntime; sizes that values decide, through the compiler and every engine's plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")

import qcompile
from qcompile.errors import EngineError, PassError
from qcompile.ir.lowered import Buffer, Entry, Step
from qcompile.ir.memory import plan_entry, undecided_sizes
from qcompile.ir.verify import verify
from qcompile.runtime.cuda.program import Program as CudaProgram
from qcompile.runtime.engines.program import Program
from tests.frontend.onnx.making import FLOAT, INT64, make, node, random, saved, stock

CLOSE = 1e-5
"""Sums of at most a few hundred products in float32, in another order."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("most", "overlap", "least"), [(4, 0.3, 0.2), (0, 0.5, None), (50, 0.0, None), (50, 0.9, 0.5)])
def test_suppression_is_onnxruntimes(centred: bool, most: int, overlap: float, least: float | None, tmp_path: Path) -> None:
    """Corners in any order, boxes without area, equal scores."""
    boxes, scores = drawn(2, 30, 4), (drawn(2, 3, 30, seed=1) * 8).round() / 8
    boxes[0, 4, 2:] = 0 if centred else boxes[0, 4, :2]
    weights = {"most": [most], "overlap": torch.tensor([overlap]), "least": torch.tensor([least if least is not None else 0.0])}
    names = "b s most overlap" + (" least" if least is not None else "")
    model = make(
        [node("NonMaxSuppression", names, "y", center_point_box=int(centred))],
        {"b": ([2, 30, 4], FLOAT), "s": ([2, 3, 30], FLOAT)}, "y", {name: weights[name] for name in names.split()[2:]},
    )  # fmt: skip
    expected = stock(saved(model, tmp_path), {"b": boxes, "s": scores})[0]
    found = torch.ops.qcompile.non_max_suppression(boxes, scores, most, overlap, least, centred)
    assert torch.equal(found, expected)
    assert bool(most) == bool(len(found))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("offset", "opset"), [(0.5, 16), (0.0, 16), (0.0, 10)])
@pytest.mark.parametrize("samples", [0, 2])
def test_regions_are_onnxruntimes(samples: int, offset: float, opset: int, largest: bool, tmp_path: Path) -> None:
    """Regions that reach beyond the image, tiny ones, and one that is turned inside out."""
    x, images = drawn(2, 3, 9, 11) - 0.5, torch.tensor([1, 0, 1, 1, 0])
    rois = torch.tensor([[1.0, 2, 9, 7], [-6, -3, 30, 40], [4, 4, 4.2, 4.1], [8, 7, 3, 2], [40, 2, 44, 9]])
    coordinates = {} if opset < 16 else {"coordinate_transformation_mode": "half_pixel" if offset else "output_half_pixel"}
    options: dict[str, Any] = {"output_height": 3, "output_width": 2, "spatial_scale": 0.5, "sampling_ratio": samples, **coordinates}
    model = make(
        [node("RoiAlign", "x r i", "y", mode="max" if largest else "avg", **options)],
        {"x": ([2, 3, 9, 11], FLOAT), "r": ([5, 4], FLOAT), "i": ([5], INT64)}, "y", opset=opset,
    )  # fmt: skip
    expected = stock(saved(model, tmp_path), {"x": x, "r": rois, "i": images})[0]
    found = torch.ops.qcompile.roi_align(x, rois, images, 3, 2, 0.5, samples, offset, largest)
    assert (found - expected).abs().max() <= CLOSE


def detector(folder: Path) -> Path:
    """Boxes and scores from a convolution; those that stay are cut out of its result and classified."""
    nodes = [
        node("Conv", "x w", "c", kernel_shape=[3, 3], strides=[4, 4]), node("Relu", "c", "f"), node("Reshape", "f flat", "r"),
        node("Transpose", "r", "p", perm=[0, 2, 1]), node("Split", "p", "boxes raw", axis=2, num_outputs=2),
        node("Sigmoid", "raw", "s"), node("Transpose", "s", "scores", perm=[0, 2, 1]),
        node("NonMaxSuppression", "boxes scores most overlap least", "kept", center_point_box=1),
        node("Split", "kept", "image kind box", axis=1, num_outputs=3), node("Concat", "image box", "pair", axis=1),
        node("GatherND", "boxes pair", "regions"), node("Squeeze", "image one", "images"),
        node("RoiAlign", "f regions images", "crops", output_height=2, output_width=3, spatial_scale=0.25),
        node("GlobalAveragePool", "crops", "pooled"), node("Flatten", "pooled", "row"), node("MatMul", "row head", "classes"),
    ]  # fmt: skip
    weights = {
        "w": random(8, 3, 3, 3) * 0.3, "flat": [0, 8, -1], "most": [5], "overlap": random(1) * 0 + 0.5, "least": random(1) * 0 + 0.52,
        "one": [1], "head": random(8, 16, seed=3),
    }  # fmt: skip
    return saved(make(nodes, {"x": (["batch", 3, "height", "width"], FLOAT)}, "kept classes", weights), folder, "detector.onnx")


def close(found: Any, expected: list[Tensor]) -> bool:
    """The same boxes, and classes within rounding."""
    kept, classes = found["kept"], found["classes"]
    return torch.equal(kept, expected[0]) and bool((classes - expected[1]).abs().max() <= CLOSE * expected[1].abs().max())


def test_a_detector_through_everything(tmp_path: Path) -> None:
    """Compiled, run with other numbers of boxes, saved, loaded, exported and imported again, as onnxruntime runs it."""
    path = detector(tmp_path)
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    assert "int64[non_max_suppression_0, 3]" in compiled.graph.text()
    inputs = [torch.randn(batch, 3, 32 * batch, 64, generator=torch.Generator().manual_seed(batch)) for batch in (1, 2, 3)]
    expected = [stock(path, {"x": x}) for x in inputs]
    assert len({len(result[0]) for result in expected}) == len(inputs)
    compiled.save(tmp_path / "out")
    again = qcompile.load(tmp_path / "out")
    reference = qcompile.load(tmp_path / "out", engine="reference")
    written = again.export_onnx(tmp_path / "exported", opset=21)
    assert written.error is not None
    assert written.error <= CLOSE
    imported = qcompile.compile(written.path, "cpu-fp32", engine="torch_cpu")
    for x, result in zip(inputs, expected, strict=True):
        for model in (compiled, again, reference, imported):
            assert close(model(x=x), result)
        assert close(dict(zip(("kept", "classes"), stock(written.path, {"x": x}), strict=True)), result)
    verify(compiled.graph, propagate=True)  # a size keeps its symbol however often its node is computed
    (kept,) = again.graph.calls(torch.ops.qcompile.non_max_suppression.default)
    assert str(again.graph.infer(kept).shape) == str(kept.meta["val"].shape)


def test_other_precisions_keep_the_boxes_of_their_own_scores(tmp_path: Path) -> None:
    """Every pass runs on a graph with such sizes; int8 activations and bfloat16 decide otherwise about few boxes."""
    path = detector(tmp_path)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = {tuple(row) for row in stock(path, {"x": x})[0].tolist()}
    for target in ("cpu-w8a8", "cpu-bf16", "cpu-int4"):
        calibration = {"calibration": [{"x": x}]} if target == "cpu-w8a8" else {}
        found = qcompile.compile(path, target, **calibration)(x=x)
        rows = {tuple(row) for row in found["kept"].tolist()}
        assert len(found["classes"]) == len(found["kept"])
        assert len(rows & expected) >= 0.8 * len(expected)


def test_places_that_are_not_0(tmp_path: Path) -> None:
    """`NonZero`, `Compress` and `Unique` of values, none of which may be left."""
    nodes = [
        node("Greater", "x zero", "m"), node("NonZero", "m", "n"), node("Transpose", "n", "t", perm=[1, 0]), node("GatherND", "x t", "y"),
        node("ReduceMax", "x axis", "top", keepdims=0), node("Greater", "top zero", "rows"), node("Compress", "x rows", "z", axis=0),
        node("MatMul", "z w", "v"), node("Round", "x", "r"), node("Unique", "r", "u first inverse c"),
    ]  # fmt: skip
    weights = {"zero": random(1)[0] * 0, "axis": [1], "w": random(5, 16)}
    path = saved(make(nodes, {"x": (["batch", 5], FLOAT)}, "y v u c", weights), tmp_path)
    compiled = qcompile.compile(path, "cpu-fp32", engine="torch_cpu")
    compiled.save(tmp_path / "out")
    exported = qcompile.load(tmp_path / "out").export_onnx(tmp_path / "exported", opset=21)
    assert exported.error is not None
    for seed, batch in enumerate((3, 7, 1)):
        x = torch.randn(batch, 5, generator=torch.Generator().manual_seed(seed)) - 0.8
        for given in (x, -x.abs()):
            expected = stock(path, {"x": given})
            for found in (list(compiled(x=given).values()), stock(exported.path, {"x": given})):
                assert [item.shape for item in found] == [item.shape for item in expected]
                assert all(torch.allclose(*pair, rtol=0, atol=CLOSE) for pair in zip(found, expected, strict=True))


def of_places(folder: Path, *nodes: Any) -> Any:
    """What a graph behind the places [1, n] of what is not 0 gives for four of six."""
    weights = {"pair": [2, -1], "first": [0], "few": 5, "zero": random(1)[0] * 0}
    used = {name for item in nodes for name in item.input}
    kept = {name: value for name, value in weights.items() if name in used}
    path = saved(make([node("NonZero", "x", "n"), *nodes], {"x": (["length"], FLOAT)}, "y", kept), folder)
    return qcompile.compile(path, "cpu-fp32", engine="torch_cpu")(x=torch.tensor([1.0, 0, 2, 3, 0, 4]))


def test_sizes_that_are_related(tmp_path: Path) -> None:
    """An even number of places, and no more of them than there are numbers, although nothing says so."""
    assert of_places(tmp_path, node("Reshape", "n pair", "y")).tolist() == [[0, 2], [3, 5]]
    behind = [node("Shape", "n", "count", start=1), node("TopK", "x count", "y where", axis=0)]
    assert of_places(tmp_path, *behind).tolist() == [4, 3, 2, 1]


def test_a_question_about_such_a_size(tmp_path: Path) -> None:
    nodes = [node("Shape", "n", "sizes", start=1), node("Squeeze", "sizes first", "count"), node("Less", "count few", "less")]
    with pytest.raises(PassError, match=r"lt \(less_node\): expected a size or a tensor, got a question about sizes"):
        of_places(tmp_path, *nodes, node("Where", "less x zero", "y"))


def entry(shape: tuple[Any, ...] = ("n", 1)) -> Entry:
    """Places of what is not 0 in x [batch], and the same moved."""
    buffers = [
        Buffer("x", "fp32", ("batch",), "input"),
        Buffer("kept", "int64", shape, "intermediate"),
        Buffer("y", "int64", shape, "output"),
    ]
    steps = (
        Step("aten.nonzero.default", ({"buffer": "x"},), {}, ("kept",)),
        Step("aten.add.Scalar", ({"buffer": "kept"}, 1), {}, ("y",)),
    )
    return Entry("forward", ("x",), ("y",), {buffer.name: buffer for buffer in buffers}, steps, {})


def test_a_plan_knows_which_sizes_values_decide() -> None:
    planned = plan_entry(entry(), {"batch": 4})
    assert undecided_sizes(planned) == {"n"}
    assert planned.limits == {"batch": 4}
    assert planned.buffers["kept"].offset == -1
    program = Program(planned, {"batch": 4}, {}, {}, torch.empty(planned.arena_bytes, dtype=torch.uint8), lambda *_: None)
    for values, places in (([0.0, 2, 0, 3], [[2], [4]]), ([1.0, 0, 0, 0], [[1]]), ([0.0] * 4, [])):
        program.tensors["x"].copy_(torch.tensor(values))
        program.run()
        assert program.tensors["y"].tolist() == places


def test_a_plan_that_says_another_shape() -> None:
    program = Program(entry(("n", 2)), {"batch": 1}, {}, {}, torch.empty(0, dtype=torch.uint8), lambda *_: None)
    program.tensors["x"].fill_(1)
    with pytest.raises(EngineError, match=r"kept: expected int64 \[1, 2\], got torch.int64 \[1, 1\]; the plan is not this model's"):
        program.run()


def test_the_cuda_engine_refuses_such_a_plan() -> None:
    context: Any = None
    with pytest.raises(EngineError, match=r"engine cuda: expected sizes that the inputs decide, got n, which values decide; load the"):
        CudaProgram(context, entry(), {"batch": 1}, {})
