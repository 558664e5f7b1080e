"""Views, joins and new tensors: everything that moves numbers and changes none; and arithmetic on sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qcompile.exporters.onnx.emitter import Call, Emitter, Value, argument, axis_of, static
from qcompile.exporters.onnx.rules.table import rule

_SIZES = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.mod: "Mod", torch.sym_max: "Max", torch.sym_min: "Min",
}  # fmt: skip


@rule("aten.sym_size.int")
def sym_size(e: Emitter, node: Call) -> Value:
    """Of an axis."""
    return e.size_of(e.value(node.args[0]), int(node.args[1]))


@rule(
    "operator.add", "operator.sub", "operator.mul", "operator.mod", "operator.floordiv", "operator.neg", "torch.sym_max", "torch.sym_min",
)  # fmt: skip
def size_arithmetic(e: Emitter, node: Call) -> Value:
    """Of sizes, which are not negative: so integer division rounds down."""
    if not e.is_size(node):
        raise e.refusal(f"expected sizes that are integers, got {node.meta.get('val')}")
    sizes = [e.size(item) for item in node.args]
    if node.target is operator.neg:
        return e.op("Neg", sizes[0])
    if node.target is operator.floordiv:
        return e.op("Div", *sizes)
    return e.op(_SIZES[node.target], *sizes)


@rule("operator.getitem")
def getitem(e: Emitter, node: Call) -> Any:
    """One of several results."""
    source: Any = node.args[0]
    return e.results[source][node.args[1]]


@rule("aten.reshape.default", "aten.view.default")
def reshape(e: Emitter, node: Call) -> Value:
    """To other sizes; those that stand at the same axis before and after are copied, and one other is what is left."""
    x: Any = node.args[0]
    value, before, after = e.value(x), e.shape(x), e.shape(node)
    alike = [str(size) for size in after[:2]] == [str(size) for size in before[:2]]
    if alike and (len(before), len(after)) == (4, 3) and ("split", value) in e.shared:
        joined: Value = e.shared["split", value]
        return joined
    made = e.op("Reshape", value, _reshaped(e, before, list(node.args[1])))
    if alike and (len(before), len(after)) == (3, 4):
        e.shared["split", made] = value
    return made


def _reshaped(e: Emitter, before: list[Any], asked: list[Any]) -> Value:
    sizes: list[Any] = [item.meta.get("val") if isinstance(item, fx.Node) else item for item in asked]
    kept = [_copied(before, place, size) for place, size in enumerate(sizes)]
    unknown = [place for place, size in enumerate(sizes) if not kept[place] and not isinstance(size, int)]
    if len(unknown) + sizes.count(-1) <= 1 and 0 not in sizes:
        return e.ints([0 if kept[place] else -1 if place in unknown else size for place, size in enumerate(sizes)])
    return e.sizes(asked)


def _copied(before: list[Any], place: int, size: Any) -> bool:
    """Whether a size that is not known is that of the same axis before."""
    return isinstance(size, torch.SymInt) and place < len(before) and str(before[place]) == str(size)


@rule("aten.view_as.default")
def view_as(e: Emitter, node: Call) -> Value:
    """To the sizes of another tensor."""
    return e.op("Reshape", e.value(node.args[0]), e.op("Shape", e.value(node.args[1])))


@rule("aten.flatten.using_ints")
def flatten(e: Emitter, node: Call) -> Value:
    """Axes from start to end become one."""
    x: Any = node.args[0]
    rank = len(e.shape(x))
    start, end = (axis_of(argument(node, place, name, default), rank) for place, name, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
    after = e.shape(x)[end + 1 :]
    if static(after):
        return e.reshape(e.value(x), [*[0] * start, -1, *after])
    value = e.value(x)
    parts = [e.op("Shape", value, start=0, end=start), e.ints([-1]), e.op("Shape", value, start=end + 1)]
    return e.op("Reshape", value, e.op("Concat", *parts, axis=0))


@rule("aten.unflatten.int")
def unflatten(e: Emitter, node: Call) -> Value:
    """One axis becomes several."""
    x: Any = node.args[0]
    axis = axis_of(int(node.args[1]), len(e.shape(x)))
    after = e.shape(x)[axis + 1 :]
    if not static(after):
        raise e.refusal("expected known sizes behind the axis that is unflattened")
    return e.op("Reshape", e.value(x), e.sizes([*[0] * axis, *node.args[2], *after]))


@rule("aten.transpose.int", "aten.t.default", "aten.permute.default", "aten.movedim.int")
def transpose(e: Emitter, node: Call) -> Value:
    """Axes in another order."""
    x: Any = node.args[0]
    rank, name = len(e.shape(x)), str(node.target)
    order = list(range(rank))
    if "permute" in name:
        order = [axis_of(axis, rank) for axis in node.args[1]]
    elif "movedim" in name:
        source, target = (axis_of(int(axis), rank) for axis in node.args[1:3])
        order.insert(target, order.pop(source))
    elif rank > 1 or node.args[1:]:
        first, second = (axis_of(int(axis), rank) for axis in (node.args[1:3] or (0, 1)))
        order[first], order[second] = order[second], order[first]
    return e.transpose(e.value(x), order)


@rule("aten.unsqueeze.default")
def unsqueeze(e: Emitter, node: Call) -> Value:
    """A new axis of one."""
    axis: Any = argument(node, 1, "dim")
    return e.op("Unsqueeze", e.value(node.args[0]), e.ints([axis_of(axis, len(e.shape(node)))]))


@rule("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(e: Emitter, node: Call) -> Value:
    """Axes of one go, those that are named or all."""
    x: Any = node.args[0]
    shape = e.shape(x)
    asked: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = [axis_of(axis, len(shape)) for axis in (asked if isinstance(asked, Sequence) else [asked])]
    gone = [axis for axis in axes if isinstance(shape[axis], int) and shape[axis] == 1]
    return e.op("Squeeze", e.value(x), e.ints(gone)) if gone else e.value(x)


@rule("aten.expand.default", "aten.expand_as.default")
def expand(e: Emitter, node: Call) -> Value:
    """Axes of one are repeated."""
    x: Any = node.args[0]
    if "expand_as" in str(node.target):
        return e.op("Expand", e.value(x), e.op("Shape", e.value(node.args[1])))
    asked: Any = node.args[1]
    return e.op("Expand", e.value(x), e.sizes([1 if isinstance(size, int) and size == -1 else size for size in asked]))


@rule("aten.cat.default", "aten.stack.default")
def cat(e: Emitter, node: Call) -> Value:
    """Tensors side by side, along an axis or a new one."""
    parts: Any = node.args[0]
    dtype, rank = e.dtype(node), len(e.shape(node))
    axis = axis_of(argument(node, 1, "dim", 0), rank)
    values = [e.value(part, dtype) for part in parts if "stack" in str(node.target) or e.shape(part) != [0]]
    if "stack" in str(node.target):
        values = [e.op("Unsqueeze", value, e.ints([axis])) for value in values]
    return e.op("Concat", *values, axis=axis)


@rule("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.tensor_split.sections", "aten.unbind.int")
def split(e: Emitter, node: Call) -> tuple[Value, ...]:
    """An axis in parts, which are known."""
    x, parts = node.args[0], node.meta["val"]
    name = str(node.target)
    axis = axis_of(argument(node, 1 if "unbind" in name else 2, "dim", 0), len(e.shape(x)))
    sizes = [1 if "unbind" in name else part.shape[axis] for part in parts]
    if not static(sizes):
        raise e.refusal("expected parts of known sizes")
    made = e.ops("Split", e.value(x), e.ints(sizes), count=len(parts), axis=axis)
    return tuple(e.op("Squeeze", part, e.ints([axis])) for part in made) if "unbind" in name else made


@rule("aten.repeat.default", "aten.tile.default")
def repeat(e: Emitter, node: Call) -> Value:
    """The tensor several times along each axis; new axes come first."""
    x, times = node.args[0], list(node.args[1])
    rank, value = len(e.shape(x)), e.value(x)
    if len(times) > rank:
        value = e.op("Unsqueeze", value, e.ints(range(len(times) - rank)))
    return e.op("Tile", value, e.sizes([*[1] * (rank - len(times)), *times]))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(e: Emitter, node: Call) -> Value:
    """Each entry of an axis several times in a row."""
    x: Any = node.args[0]
    shape, axis = e.shape(x), argument(node, 2, "dim")
    if axis is None or not isinstance(node.args[1], int):
        raise e.refusal("expected an axis and a known number of repeats")
    axis = axis_of(axis, len(shape))
    spread = e.op("Unsqueeze", e.value(x), e.ints([axis + 1]))
    tiled = e.op("Tile", spread, e.ints([node.args[1] if place == axis + 1 else 1 for place in range(len(shape) + 1)]))
    if not static(shape[axis + 1 :]):
        raise e.refusal("expected known sizes behind the axis that is repeated")
    return e.reshape(tiled, [*[0] * axis, -1, *shape[axis + 1 :]])


@rule("aten.constant_pad_nd.default", "aten.pad.default")
def pad(e: Emitter, node: Call) -> Value:
    """Numbers around; pads come in pairs from the last axis on."""
    x, asked = node.args[0], list(node.args[1])
    mode = argument(node, 2, "mode", "constant") if "aten.pad" in str(node.target) else "constant"
    known = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    fill = argument(node, 3, "value", 0) if "aten.pad" in str(node.target) else argument(node, 2, "value", 0)
    before, after = [0] * len(e.shape(x)), [0] * len(e.shape(x))
    for place in range(len(asked) // 2):
        before[-1 - place], after[-1 - place] = asked[2 * place], asked[2 * place + 1]
    number = e.constant(fill or 0, e.dtype(node)) if mode == "constant" else None
    return e.op("Pad", e.value(x), e.sizes([*before, *after]), number, mode=known[str(mode)])


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(e: Emitter, node: Call) -> Value:
    """Channels become pixels."""
    return e.op("DepthToSpace", e.value(node.args[0]), blocksize=int(node.args[1]), mode="CRD")


@rule(
    "aten.full.default", "aten.zeros.default", "aten.ones.default", "aten.new_full.default", "aten.new_zeros.default",
    "aten.new_ones.default", "aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.scalar_tensor.default",
    "aten.fill.Scalar",
)  # fmt: skip
def filled(e: Emitter, node: Call) -> Value:
    """One number everywhere."""
    name, dtype = str(node.target), e.dtype(node)
    number: Any = 0 if "zeros" in name else 1 if "ones" in name else None
    if number is None:
        place = {"full.default": 1, "new_full.default": 2, "full_like.default": 1, "scalar_tensor.default": 0, "fill.Scalar": 1}
        number = node.args[place[name.removeprefix("aten.")]]
    if not isinstance(number, bool | int | float):
        raise e.refusal("expected a number to fill with")
    fill = e.constant(number, dtype)
    if "scalar_tensor" in name:
        return fill
    if "_like" in name or "fill" in name:
        return e.op("Expand", fill, e.op("Shape", e.value(node.args[0])))
    asked: Any = node.args[1] if "new_" in name else node.args[0]
    return e.op("Expand", fill, e.sizes(asked)) if asked else fill


@rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(e: Emitter, node: Call) -> Value:
    """Numbers one step apart."""
    start, end, step = (0, node.args[0], 1) if len(node.args) == 1 else (*node.args, 1)[:3]
    dtype = e.dtype(node)
    if dtype.is_floating_point:
        return e.op("Range", *(e.value(item, dtype) for item in (start, end, step)))
    numbers = [e.op("Squeeze", e.size(item), e.ints([0])) for item in (start, end, step)]
    made = e.op("Range", *numbers)
    return made if dtype == torch.int64 else e.cast(made, dtype)
