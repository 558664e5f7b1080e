"""The cache of a language model as ONNX has it: tensors of the past go in, tensors of the present come out.

`past_key_values.0.key` is [B, L, P, D] and `present.0.key` [B, L, P + S, D], both in the dtype or the integers that the graph stores; a
form with scales has them beside it, `past_key_values.0.key.scale` [B, L, P, G]. `attention_mask` [B, P + S] says which columns are tokens;
positions count those. Nothing is paged. Padding lies on the right for onnxruntime's own attention, elsewhere where the caller likes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompile.errors import ExportError
from qcompile.exporters.onnx.emitter import DTYPES, Emitter, Value
from qcompile.quant.element import FP8
from qcompile.quant.vector_format import VectorForm, VectorFormat, vector_format
from qcompile.quant.vectors.static import StaticFormat

_ATTENTION_OPSET = 23
"""Since which Attention is a standard operator."""
_STATE = re.compile(r"(keys|values)_(\d+)")
_KINDS = {"keys": "key", "values": "value"}
_STORED = (4, 8)
"""Bits of integers that are stored."""


@dataclass
class PastState:
    """The pages of one layer's keys or values: what is there, and what is there afterwards.

    Attributes:
        node: the placeholder.
        name: as in `past_key_values.0.key`, without what stands before.
        form: how vectors are stored, None for numbers.
        dtype: of the numbers or the codes.
        values: the inputs: numbers, or codes and scales and, where the form has them, least values.
        present: the outputs alike.
    """

    node: fx.Node
    name: str
    form: VectorForm | None
    dtype: torch.dtype
    values: list[Value] = field(default_factory=list)
    present: list[Value] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """What the names of its tensors end in."""
        uniform = isinstance(self.form, VectorFormat)
        return ["", *([".scale"] if uniform else []), *([".least"] if uniform and not self.form.symmetric else [])]  # type: ignore[union-attr]


@dataclass
class New:
    """New vectors [B, L, S, D], and the form they are to be stored in (empty for numbers) with its tables."""

    value: Value
    shape: list[Any]
    form: str = ""
    tables: Any = None
    dtype: torch.dtype = torch.float32


@dataclass
class Cached:
    """A state with what comes."""

    state: PastState
    new: New


class CacheInputs:
    """Inputs of a cached model in place of positions, page table and pages, and what attention reads of them."""

    def __init__(self, e: Emitter, names: dict[str, str]) -> None:
        """Declare them; `names` are those of symbols in shapes."""
        self.names = names
        nodes = {node.name: node for node in e.graph.placeholders}
        refused = [node for node in e.graph.states if _STATE.fullmatch(node.name) is None]
        if refused:
            raise ExportError(
                f"export_onnx: {refused[0].name}: expected a cache that stores every token as it comes, got one that keeps tokens, or what "
                "they are made from, in other ways; compile with kv16, kv8, kv8-static or kvfp8, or with cache_sinks=0, cache_window=0 and "
                "a form per token"
            )
        self.ids = self._input("input_ids", torch.int64, ["batch", "sequence"])
        self.mask = self._input("attention_mask", torch.int64, ["batch", "total_sequence"])
        forms = _forms(e)
        self.states = [self._state(node, forms) for node in e.graph.states]
        e.results |= {nodes["input_ids"]: self.ids, nodes["page_table"]: None}
        e.results |= {state.node: state for state in self.states}
        e.results[nodes["positions"]] = self._positions(e)
        e.shared["cache"] = self
        self._masks: dict[Any, Value] = {}

    @property
    def inputs(self) -> list[Value]:
        """In order."""
        return [self.ids, self.mask, *(value for state in self.states for value in state.values)]

    @property
    def outputs(self) -> list[tuple[str, Value]]:
        """The present, by name."""
        return [
            (f"present.{state.name}{part}", value)
            for state in self.states
            for part, value in zip(state.parts, state.present, strict=True)
        ]  # fmt: skip

    @staticmethod
    def _input(name: str, dtype: torch.dtype, shape: list[Any]) -> Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))

    def _state(self, node: fx.Node, forms: dict[fx.Node, tuple[str, int]]) -> PastState:
        match = _STATE.fullmatch(node.name)
        assert match is not None
        text, size = forms.get(node, ("", int(node.meta["val"].shape[3])))
        form = vector_format(text) if text else None
        require_form(form, node)
        name = f"{match[2]}.{_KINDS[match[1]]}"
        state = PastState(node, name, form, _stored_dtype(form, node))
        heads, columns = int(node.meta["val"].shape[1]), ["batch", int(node.meta["val"].shape[1]), "past_sequence"]
        width = size // 2 if state.dtype == torch.uint8 else size
        state.values.append(self._input(f"past_key_values.{name}", state.dtype, ["batch", heads, "past_sequence", width]))
        for part in state.parts[1:]:
            assert isinstance(form, VectorFormat)
            state.values.append(self._input(f"past_key_values.{name}{part}", torch.float16, [*columns, form.groups(size)]))
        return state

    def _positions(self, e: Emitter) -> Value:
        """How many tokens stand before each new one, int64 [B, S]; -1 at padding on the left, where nobody looks."""
        self.columns = e.op("Sub", e.op("CumSum", self.mask, e.constant(1, torch.int64)), e.ints([1]))
        self.new, self.total = e.size_of(self.ids, 1), e.size_of(self.mask, 1)
        return e.op("Slice", self.columns, e.op("Sub", self.total, self.new), self.total, e.ints([1]))

    # What attention may see

    def keep(self, e: Emitter, window: int) -> Value:
        """Bool [B, 1, S, P + S]: real tokens up to the query's own position, the last `window` of them if that is not 0.

        A query of padding sees itself, so that its numbers stay finite; nobody reads them.
        """
        if window not in self._masks:
            with e.on_behalf_of_all():
                self._masks[window] = self._seen(e, window)
        return self._masks[window]

    def _seen(self, e: Emitter, window: int) -> Value:
        column = e.op("Unsqueeze", self.columns, e.ints([1, 2]))
        row = e.op("Slice", self.columns, e.op("Sub", self.total, self.new), self.total, e.ints([1]))
        row = e.op("Unsqueeze", row, e.ints([1, 3]))
        seen = e.op("And", e.op("LessOrEqual", column, row), e.op("Unsqueeze", e.cast(self.mask, torch.bool), e.ints([1, 2])))
        if window:
            seen = e.op("And", seen, e.op("Greater", column, e.op("Sub", row, e.ints([window]))))
        return e.op("Or", seen, self._itself(e))

    def _itself(self, e: Emitter) -> Value:
        """Bool [S, P + S]: the query's own column."""
        if "itself" not in self._masks:
            total, new = (e.op("Squeeze", size, e.ints([0])) for size in (self.total, self.new))
            one = e.constant(1, torch.int64)
            column = e.op("Range", e.constant(0, torch.int64), total, one)
            row = e.op("Unsqueeze", e.op("Range", e.op("Sub", total, new), total, one), e.ints([1]))
            self._masks["itself"] = e.op("Equal", column, row)
        return self._masks["itself"]

    def additive(self, e: Emitter, window: int) -> Value:
        """The same as numbers to add to scores."""
        key = ("additive", window)
        if key not in self._masks:
            with e.on_behalf_of_all():
                none, least = e.constant(0.0, torch.float32), e.constant(-1e30, torch.float32)
                self._masks[key] = e.op("Where", self.keep(e, window), none, least)
        return self._masks[key]

    def lengths(self, e: Emitter) -> tuple[Value, Value]:
        """Tokens of each row less one, int32 [B], and columns in all, int32 []."""
        if "lengths" not in self._masks:
            with e.on_behalf_of_all():
                tokens = e.op("Sub", e.op("ReduceSum", self.mask, e.ints([1]), keepdims=0), e.ints([1]))
                self._masks["lengths"] = e.cast(tokens, torch.int32)
                self._masks["columns"] = e.cast(e.op("Squeeze", self.total, e.ints([0])), torch.int32)
        return self._masks["lengths"], self._masks["columns"]

    # What is stored

    def standard_attention(self, e: Emitter, keys: Cached, values: Cached) -> bool:
        """Whether the standard operator can read and make these: numbers in float32."""
        plain = all(item.state.form is None and item.state.dtype == torch.float32 for item in (keys, values))
        return plain and e.opset >= _ATTENTION_OPSET and keys.new.shape[-1] == values.new.shape[-1]

    def serves_grouped(self, keys: Cached, values: Cached, dtype: torch.dtype) -> bool:
        """Whether onnxruntime's attention can: numbers of the type it computes in, or 8 bits with a scale for each channel."""
        same = keys.new.shape[-1] == values.new.shape[-1]
        plain = all(item.state.form is None and item.state.dtype == dtype for item in (keys, values))
        static = all(isinstance(item.state.form, StaticFormat) and item.state.form.element.bits == 8 for item in (keys, values))
        return same and (plain or static)

    def scales(self, e: Emitter, keys: Cached, values: Cached) -> tuple[tuple[Value | None, ...], dict[str, Any]]:
        """Operands and attributes of onnxruntime's attention over static integers; nothing for numbers."""
        if keys.state.form is None:
            return (), {}
        made = []
        for item in (keys, values):
            table = item.new.tables[0]
            scale = e.value(table, torch.float32)
            made.append(e.reshape(scale, [int(e.shape(table)[0]), 1, -1]))
        return tuple(made), {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

    def numbers(self, e: Emitter, item: Cached) -> Value:
        """All vectors float32 [B, L, P + S, D]; what is there afterwards is noted."""
        state, new = item.state, item.new
        if not state.present:
            parts = encoded(e, state, new)
            state.present = [_joined(e, past, part) for past, part in zip(state.values, parts, strict=True)]
        return decoded(e, state, new)


def _joined(e: Emitter, past: Value, new: Value) -> Value:
    """Past and new tokens; runtimes join no float8, which float16 holds."""
    if past.dtype != DTYPES[torch.float8_e4m3fn]:
        return e.op("Concat", past, new, axis=2)
    both = e.op("Concat", *(e.cast(part, torch.float16) for part in (past, new)), axis=2)
    return e.cast(both, torch.float8_e4m3fn)


def _forms(e: Emitter) -> dict[fx.Node, tuple[str, int]]:
    """Placeholder -> the form that it is stored in, and how many numbers a vector has."""
    found = {}
    for node in e.graph.fx.nodes:
        if node.op == "call_function" and str(node.target) == "qcompile.cache_append.default":
            for state, new in zip(node.args[:2], node.args[2:4], strict=True):
                if str(new.target) == "qcompile.pack_vectors.default":
                    found[state] = (str(new.args[1]), int(new.args[0].meta["val"].shape[-1]))
    return found


def require_form(form: VectorForm | None, node: fx.Node) -> None:
    """Refuse what ONNX has no types or operators for."""
    if form is None:
        return
    known = isinstance(form, StaticFormat) or (isinstance(form, VectorFormat) and form.tokens == 1)
    element = form.element if isinstance(form, StaticFormat | VectorFormat) else None
    if not known or element is None or (element != FP8 and element.bits not in _STORED):
        raise ExportError(
            f"export_onnx: {node.name}: expected keys and values as numbers, or per token in 8 or 4 bits, got {form}; compile with kv16, "
            "kv8 or kv8-static"
        )


def _stored_dtype(form: VectorForm | None, node: fx.Node) -> torch.dtype:
    """Of codes: 4 bits are two to a byte."""
    if form is None:
        found: torch.dtype = node.meta["val"].dtype
        return found
    assert isinstance(form, StaticFormat | VectorFormat)
    if form.element == FP8:
        return torch.float8_e4m3fn
    return torch.int8 if form.element.bits == 8 else torch.uint8


def encoded(e: Emitter, state: PastState, new: New) -> list[Value]:
    """New vectors as they are stored."""
    form = state.form
    if form is None:
        return [e.cast_to(new, state.dtype)]
    if isinstance(form, StaticFormat):
        scale = e.op("Unsqueeze", e.value(new.tables[0], torch.float32), e.ints([1]))
        return [_integers(e, e.op("Round", e.op("Div", new.value, scale)), form.element.bits, signed=True)]
    assert isinstance(form, VectorFormat)
    size = int(new.shape[-1])
    groups = form.groups(size)
    grouped = e.reshape(new.value, [0, 0, 0, groups, -1])
    parts = _symmetric(e, grouped, form) if form.symmetric else _asymmetric(e, grouped, form)
    codes = e.reshape(parts[0], [0, 0, 0, size])
    stored = e.cast(codes, torch.float8_e4m3fn) if form.element == FP8 else _integers(e, codes, form.element.bits, signed=form.symmetric)
    return [stored, *(e.cast(e.op("Squeeze", part, e.ints([-1])), torch.float16) for part in parts[1:])]


def _usable(e: Emitter, scale: Value) -> Value:
    """Rounded to float16, at least its least normal number."""
    least = e.constant(float(torch.finfo(torch.float16).tiny), torch.float32)
    return e.cast(e.cast(e.op("Max", scale, least), torch.float16), torch.float32)


def _symmetric(e: Emitter, x: Value, form: VectorFormat) -> list[Value]:
    """Codes before they are integers, and scales [..., 1]."""
    top = FP8.largest if form.element == FP8 else float(form.element.high)
    largest = e.op("ReduceMax", e.op("Abs", x), e.ints([-1]), keepdims=1)
    scale = _usable(e, e.op("Div", largest, e.constant(top, torch.float32)))
    scaled = e.op("Div", x, scale)
    if form.element == FP8:
        return [e.op("Clip", scaled, e.constant(-top, torch.float32), e.constant(top, torch.float32)), scale]
    return [e.op("Round", scaled), scale]


def _asymmetric(e: Emitter, x: Value, form: VectorFormat) -> list[Value]:
    """Codes, scales and least values [..., 1]."""
    least = e.cast(e.cast(e.op("ReduceMin", x, e.ints([-1]), keepdims=1), torch.float16), torch.float32)
    greatest = e.op("ReduceMax", x, e.ints([-1]), keepdims=1)
    top = e.constant(float(form.element.levels - 1), torch.float32)
    scale = _usable(e, e.op("Div", e.op("Sub", greatest, least), top))
    return [e.op("Round", e.op("Div", e.op("Sub", x, least), scale)), scale, least]


def _integers(e: Emitter, codes: Value, bits: int, *, signed: bool) -> Value:
    """Clipped to `bits` bits: int8, or two unsigned codes to a byte, the first in its low half; unsigned codes of 8 bits less 128."""
    low = -(1 << (bits - 1)) if signed else 0
    ends = e.constant(float(low), torch.float32), e.constant(float(low + (1 << bits) - 1), torch.float32)
    clipped = e.op("Clip", codes, *ends)
    if bits == 8:
        return e.cast(clipped if signed else e.op("Sub", clipped, e.constant(128.0, torch.float32)), torch.int8)
    shifted = e.op("Sub", clipped, e.constant(float(low), torch.float32)) if signed else clipped
    pairs = e.reshape(shifted, [0, 0, 0, -1, 2])
    weights = e.constant([1.0, 16.0], torch.float32)
    return e.cast(e.op("ReduceSum", e.op("Mul", pairs, weights), e.ints([-1]), keepdims=0), torch.uint8)


def decoded(e: Emitter, state: PastState, new: New) -> Value:
    """All stored vectors as float32 [B, L, T, D]."""
    form, codes = state.form, state.present[0]
    if form is None:
        return codes if state.dtype == torch.float32 else e.cast(codes, torch.float32)
    assert isinstance(form, StaticFormat | VectorFormat)
    signed = isinstance(form, StaticFormat) or form.symmetric
    numbers = _codes(e, codes, form.element.bits, signed=signed, floating=form.element == FP8)
    if isinstance(form, StaticFormat):
        return e.op("Mul", numbers, e.op("Unsqueeze", e.value(new.tables[0], torch.float32), e.ints([1])))
    size = int(new.shape[-1])
    grouped = e.reshape(numbers, [0, 0, 0, form.groups(size), -1])
    scale, *least = (e.op("Unsqueeze", e.cast(part, torch.float32), e.ints([-1])) for part in state.present[1:])
    values = e.op("Mul", grouped, scale)
    values = e.op("Add", values, least[0]) if least else values
    return e.reshape(values, [0, 0, 0, size])


def _codes(e: Emitter, stored: Value, bits: int, *, signed: bool, floating: bool) -> Value:
    """Codes as float32."""
    if floating:
        return e.cast(stored, torch.float32)
    if bits == 8:
        numbers = e.cast(stored, torch.float32)
        return numbers if signed else e.op("Add", numbers, e.constant(128.0, torch.float32))
    low, high = e.unsigned([15], torch.uint8), e.unsigned([4], torch.uint8)
    parts = [e.op("BitwiseAnd", stored, low), e.op("BitShift", stored, high, direction="RIGHT")]
    both = e.op("Concat", *(e.op("Unsqueeze", part, e.ints([-1])) for part in parts), axis=-1)
    numbers = e.cast(e.reshape(both, [0, 0, 0, -1]), torch.float32)
    return e.op("Sub", numbers, e.constant(8.0, torch.float32)) if signed else numbers
