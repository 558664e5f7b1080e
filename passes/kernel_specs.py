"""From a node of the final graph to the specification of the kernel that would serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import activation_ops as _activation_ops  # noqa: F401  registers operators of quantized activations
from qcompile.ir import append_ops as _append_ops  # noqa: F401  registers operators that pack and store at once
from qcompile.ir import fused_activation_ops as _fused_activation_ops  # noqa: F401  registers producers of quantized activations
from qcompile.ir import fused_asymmetric_ops as _fused_asymmetric_ops  # noqa: F401  registers their asymmetric twins
from qcompile.ir import retention_ops as _retention_ops  # noqa: F401  registers operators of caches that keep some tokens as they came
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import BUCKETS, KernelSpec, item_operand
from qcompile.passes.generic_specs import generic_spec
from qcompile.passes.raise_patterns import activation_name
from qcompile.quant.scheme import dtype_name

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_STORED = {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
Sizes = dict[str, int]


def _last(operand: str, name: str) -> Callable[[dict[str, Any]], Sizes]:
    return lambda operands: {name: operands[operand].shape[-1]}


def _matrix(operands: dict[str, Any]) -> Sizes:
    return {"N": operands["weight" if "weight" in operands else "codes"].shape[0], "K": operands["x"].shape[-1]}


def _code_matrix(operands: dict[str, Any]) -> Sizes:
    return {"N": operands["w_codes"].shape[0], "K": operands["codes"].shape[-1]}


def _rotated(operands: dict[str, Any]) -> Sizes:
    order = {"M": operands["matrix"].shape[0]} if "matrix" in operands else {}
    return {"K": operands["gate" if "gate" in operands else "x"].shape[-1], **order}


def _table(operands: dict[str, Any]) -> Sizes:
    return {"N": operands["weight" if "weight" in operands else "codes"].shape[0], "K": operands["out"].shape[-1]}


def _cache(operands: dict[str, Any]) -> Sizes:
    return {"L": operands["keys"].shape[1], "D": operands["keys"].shape[3]}


def _packed(operands: dict[str, Any]) -> Sizes:
    return {"L": operands["k"].shape[1], "D": operands["k"].shape[3]}


def _attend(operands: dict[str, Any]) -> Sizes:
    return {"H": operands["q"].shape[1], "L": operands["keys"].shape[1], "D": operands["q"].shape[3]}


def _whole(operands: dict[str, Any]) -> Sizes:
    return {"H": operands["q"].shape[1], "L": operands["k"].shape[1], "D": operands["q"].shape[3]}


def _recent(operands: dict[str, Any]) -> Sizes:
    return {"L": operands["rows"].shape[1], "N": operands["rows"].shape[2], "D": operands["rows"].shape[3]}


def _exact(operands: dict[str, Any]) -> Sizes:
    return {"L": operands["exact"].shape[1], "D": operands["exact"].shape[3]}


OPERATORS: dict[Any, tuple[str, tuple[str, ...], Callable[[dict[str, Any]], Sizes], bool]] = {
    aten.linear.default: ("linear", ("x", "weight", "bias"), _matrix, True),
    qcompile.quantized_linear.default: (
        "quantized_linear", ("x", "codes", "scale", "zero", "bias", "", "", "", "scale2"), _matrix, True,
    ),
    qcompile.rms_norm.default: ("rms_norm", ("x", "weight"), _last("x", "K"), False),
    qcompile.add_rms_norm.default: ("add_rms_norm", ("x", "residual", "weight"), _last("x", "K"), False),
    aten.layer_norm.default: ("layer_norm", ("x", "", "weight", "bias"), _last("x", "K"), False),
    qcompile.rotary_table.default: ("rotary_table", ("positions", "inv_freq"), _last("inv_freq", "F"), False),
    qcompile.rope.default: ("rope", ("x", "cos", "sin"), lambda o: {"H": o["x"].shape[1], "R": o["x"].shape[3]}, False),
    qcompile.gated_activation.default: ("gated_activation", ("gate", "up"), _last("gate", "I"), False),
    qcompile.cache_append.default: (
        "cache_append_", ("keys", "values", "k", "v", "page_table", "positions"), _cache, False,
    ),
    qcompile.cache_attend.default: ("cache_attend", ("q", "keys", "values", "page_table", "positions", "", "", "", "sinks"), _attend, True),
    qcompile.append_packed.default: (
        "append_packed_", ("keys", "values", "k", "v", "page_table", "positions", "", "", "matrix"), _packed, False,
    ),
    qcompile.cache_attend_packed.default: (
        "cache_attend_packed", ("q", "keys", "values", "page_table", "positions", "", "", "", "", "", "sinks"), _attend, True,
    ),
    qcompile.pack_vectors.default: ("pack_vectors", ("x",), _last("x", "D"), False),
    qcompile.with_recent.default: ("with_recent", ("rows", "x", "slots"), _recent, False),
    qcompile.settle.default: ("settle_", ("pages", "exact", "page_table", "positions"), _exact, False),
    qcompile.retain.default: ("retain_", ("rows", "exact", "slots", "positions"), _exact, False),
    qcompile.attention.default: ("attention", ("q", "k", "v", "padding"), _whole, False),
    qcompile.attend_settled.default: (
        "attend_settled",
        ("q", "keys", "values", "exact_keys", "exact_values", "page_table", "positions", *[""] * 8, "sinks"), _attend, True,
    ),
    aten.embedding.default: ("embedding", ("weight", "indices"), _table, False),
    qcompile.quantized_embedding.default: ("quantized_embedding", ("indices", "codes", "scale", "zero"), _table, False),
    qcompile.integer_linear.default: (
        "integer_linear", ("codes", "scale", "zero", "w_codes", "w_scale", "w_zero", "bias"), _code_matrix, True,
    ),
    qcompile.float8_linear.default: ("float8_linear", ("codes", "scale", "w_codes", "w_scale", "bias"), _code_matrix, True),
    qcompile.quantize_activation.default: ("quantize_activation", ("x",), _rotated, False),
    qcompile.quantize_activation_asym.default: ("quantize_activation_asym", ("x",), _rotated, False),
    qcompile.quantize_static.default: ("quantize_static", ("x", "scale", "zero"), _rotated, False),
    qcompile.hadamard.default: ("hadamard", ("x", "matrix"), _rotated, False),
    qcompile.hadamard_quantize.default: ("hadamard_quantize", ("x", "matrix"), _rotated, False),
    qcompile.norm_quantize.default: ("norm_quantize", ("x", "weight", "", "", "matrix"), _rotated, False),
    qcompile.add_norm_quantize.default: ("add_norm_quantize", ("x", "residual", "weight", "", "", "matrix"), _rotated, False),
    qcompile.gated_quantize.default: ("gated_quantize", ("gate", "up", "", "matrix"), _rotated, False),
    qcompile.hadamard_quantize_asym.default: ("hadamard_quantize_asym", ("x", "matrix"), _rotated, False),
    qcompile.norm_quantize_asym.default: ("norm_quantize_asym", ("x", "weight", "", "", "matrix"), _rotated, False),
    qcompile.add_norm_quantize_asym.default: (
        "add_norm_quantize_asym", ("x", "residual", "weight", "", "", "matrix"), _rotated, False,
    ),
    qcompile.gated_quantize_asym.default: ("gated_quantize_asym", ("gate", "up", "", "matrix"), _rotated, False),
    qcompile.gather_last.default: ("gather_last", ("x", "positions"), _last("x", "K"), False),
    aten.add.Tensor: ("add", ("x", "y"), _last("x", "K"), False),
    aten.gelu.default: ("activation", ("x",), _last("x", "K"), False),
    aten.silu.default: ("activation", ("x",), _last("x", "K"), False),
    aten.relu.default: ("activation", ("x",), _last("x", "K"), False),
}  # fmt: skip
"""Operator -> the specification's name, its operands by position ("" is not a tensor), its sizes, and whether it has buckets."""

_NO_RESULT = ("cache_append_", "append_packed_", "settle_", "retain_")
_PER_SEQUENCE = ("slots",)
"""Operands whose only axis is the batch."""
_POLICY = ("first", "recent", "group")


def kernel_specs(graph: Graph, node: fx.Node) -> dict[str, KernelSpec]:
    """The specification per bucket (one under "" where rows do not matter); empty for an operator no kernel is made for."""
    return _named_specs(graph, node) or _generic_specs(graph, node)


def _generic_specs(graph: Graph, node: fx.Node) -> dict[str, KernelSpec]:
    spec = generic_spec(node, lambda value: _format(graph, None, value))
    return {} if spec is None else {"": spec}


def _named_specs(graph: Graph, node: fx.Node) -> dict[str, KernelSpec]:
    if node.target not in OPERATORS:
        return {}
    name, names, sizes, bucketed = OPERATORS[node.target]
    arguments = {operand: value for operand, value in zip(names, node.args, strict=False) if operand and isinstance(value, fx.Node)}
    arguments |= _unnamed(node, names)
    values: dict[str, Any] = {operand: value.meta["val"] for operand, value in arguments.items()}
    results = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else (node.meta["val"],)
    if name not in _NO_RESULT:
        values |= {f"out{index or ''}": value for index, value in enumerate(results)}
    if not _regular(node, values, name):
        return {}
    formats = {operand: _format(graph, arguments.get(operand), value) for operand, value in values.items()}
    parts = (tuple(sorted(sizes(values).items())), tuple(sorted(formats.items())), tuple(sorted(_options(node, name).items())))
    return {bucket: KernelSpec(name, *parts, bucket) for bucket in (BUCKETS if bucketed else ("",))}


def _unnamed(node: fx.Node, names: tuple[str, ...]) -> dict[str, fx.Node]:
    """Tensors that the table has no name for, by the schema's, also those of a list: a kernel refuses what it does not know."""
    named = {place for place, operand in enumerate(names) if operand}
    given = [(key, value) for place, (key, value) in enumerate(_given(node).items()) if place not in named]
    lists = [(key, value) for key, value in given if isinstance(value, list | tuple)]
    found = dict(given) | {item_operand(key, place): item for key, items in lists for place, item in enumerate(items)}
    return {key: value for key, value in found.items() if isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor)}


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of the call by the names of the operator's schema, in its order."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(schema, node.args, strict=False)) | node.kwargs
    return {name: given.get(name) for name in schema}


def _regular(node: fx.Node, values: dict[str, Any], name: str) -> bool:
    """Whether the call has the form the kernel is defined for: tensors only, nothing broadcast in an add."""
    if not all(isinstance(value, Tensor) for value in values.values()):
        return False
    for operand, value in values.items():
        if value.dim() not in (0, 2) and operand not in _PER_SEQUENCE and not isinstance(value.shape[-1], int):
            return False
    if name == "add":
        shapes = [list(map(str, value.shape)) for value in values.values()]
        return len(values) == 3 and not node.kwargs and shapes[0] == shapes[1]
    if name == "layer_norm":
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return True


def _format(graph: Graph, node: fx.Node | None, value: Tensor) -> str:
    constant = graph.constant(node)
    packed = (torch.uint8, torch.float8_e4m3fn)
    if constant is not None and constant.format is not None and constant.dtype in packed and "codes" in str(node.target):  # type: ignore[union-attr]
        return str(constant.format)
    return _STORED.get(value.dtype, dtype_name(value.dtype))


_RANGE = ("bits", "group_size", "element", "clip")
_NORM = ("eps", "offset")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "rms_norm": _NORM,
    "add_rms_norm": _NORM,
    "rotary_table": ("scaling",),
    "gated_activation": ("activation",),
    "attention": ("scale", "causal", "window", "softcap"),
    "cache_attend": ("scale", "window", "softcap"),
    "cache_attend_packed": ("k_form", "v_form", "scale", "window", "softcap", "products"),
    "pack_vectors": ("form",),
    "append_packed_": ("k_form", "v_form", "size"),
    "settle_": ("form", *_POLICY),
    "retain_": _POLICY,
    "attend_settled": ("k_form", "v_form", *_POLICY, "scale", "window", "softcap", "products"),
    "integer_linear": ("group_size",),
    "float8_linear": ("group_size",),
    "quantize_activation": _RANGE,
    "quantize_activation_asym": _RANGE,
    "quantize_static": ("bits", "element"),
    "hadamard": ("size",),
    "hadamard_quantize": ("hadamard_size", *_RANGE),
    "norm_quantize": ("hadamard_size", *_NORM, *_RANGE),
    "add_norm_quantize": ("hadamard_size", *_NORM, *_RANGE),
    "gated_quantize": ("hadamard_size", "activation", *_RANGE),
    "hadamard_quantize_asym": ("hadamard_size", *_RANGE),
    "norm_quantize_asym": ("hadamard_size", *_NORM, *_RANGE),
    "add_norm_quantize_asym": ("hadamard_size", *_NORM, *_RANGE),
    "gated_quantize_asym": ("hadamard_size", "activation", *_RANGE),
}
"""Specification -> the arguments that are static attributes of it, by the names of the operator's schema."""

_RENAMED = {(name, "size"): "hadamard_size" for name in ("hadamard", "append_packed_")}


def _options(node: fx.Node, name: str) -> dict[str, Any]:
    """The static attributes of the call."""
    if name == "activation":
        return {"activation": activation_name(node)}
    if name == "layer_norm":
        return {"eps": node.args[4] if len(node.args) > 4 else 1e-5}
    given = {key: value for key, value in _given(node).items() if value is not None}
    options = {_RENAMED.get((name, key), key): given[key] for key in _OPTIONS.get(name, ()) if key in given}
    if name in ("integer_linear", "float8_linear"):
        # One scale for every row is a constant [1]; scales of their own have the axes of the rows.
        options["static"] = given["scale"].meta["val"].dim() == 1
    return options
