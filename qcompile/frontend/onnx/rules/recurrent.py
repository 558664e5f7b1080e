"""Recurrences over sequences of a fixed length, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError, is_symbolic

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": F.softsign, "softplus": F.softplus,
}  # fmt: skip
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_MOST_STEPS = 256


@dataclass(frozen=True)
class Cell:
    """One direction: weight [G·H, I], recurrent [G·H, H], biases [G·H] each, peepholes [3·H] or None, activations, options."""

    weight: Tensor
    recurrent: Tensor
    bias: Tensor
    recurrent_bias: Tensor
    peepholes: Tensor | None
    functions: list[Callable[[Tensor], Tensor]]
    linear_before_reset: bool

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step; gates in the order input, output, forget, cell."""
        i, o, f, g = (F.linear(x, self.weight, self.bias) + F.linear(h, self.recurrent, self.recurrent_bias)).chunk(4, -1)
        pi, po, pf = self.peepholes.chunk(3) if self.peepholes is not None else (None, None, None)
        gate, candidate, outward = self.functions
        i, f = gate(i if pi is None else i + pi * c), gate(f if pf is None else f + pf * c)
        c = f * c + i * candidate(g)
        return gate(o if po is None else o + po * c) * outward(c), c

    def gru(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step; gates in the order update, reset, hidden."""
        gate, candidate = self.functions
        wz, wr, wh = F.linear(x, self.weight, self.bias).chunk(3, -1)
        rz, rr, rh = self.recurrent.chunk(3)
        bz, br, bh = self.recurrent_bias.chunk(3)
        update, reset = gate(wz + F.linear(h, rz, bz)), gate(wr + F.linear(h, rr, br))
        inner = reset * F.linear(h, rh, bh) if self.linear_before_reset else F.linear(reset * h, rh, bh)
        return (1 - update) * candidate(wh + inner) + update * h, c

    def rnn(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        return self.functions[0](F.linear(x, self.weight, self.bias) + F.linear(h, self.recurrent, self.recurrent_bias)), c


@rule("LSTM", "GRU", "RNN")
def recurrence(node: Node) -> tuple[Any, ...]:
    """All steps of all directions, unrolled."""
    layout = node.integer("layout", 0)
    x = node.tensor(0).transpose(0, 1) if layout else node.tensor(0)
    steps = x.shape[0]
    if is_symbolic(steps) or steps > _MOST_STEPS:
        raise RefusalError(f"expected a fixed number of at most {_MOST_STEPS} steps, got {steps}")
    if node.has(4) and any(length != steps for length in node.elements(4, "the lengths of sequences")):
        raise RefusalError(f"expected sequences of {steps} steps each, got {node.elements(4)}")
    cells = _cells(node)
    hidden, state = (_initial(node, index, len(cells), x, cells[0], layout) for index in (5, 6))
    run = [_run(node.operator, cell, x, hidden[at], state[at], _reverse(node, at)) for at, cell in enumerate(cells)]
    outputs = torch.stack([item[0] for item in run], 1)
    last, kept = torch.stack([item[1] for item in run]), torch.stack([item[2] for item in run])
    if layout:
        outputs, last, kept = outputs.permute(2, 0, 1, 3), last.transpose(0, 1), kept.transpose(0, 1)
    return (outputs, last, kept) if node.operator == "LSTM" else (outputs, last)


def _reverse(node: Node, at: int) -> bool:
    return at == 1 or node.text("direction", "forward") == "reverse"


def _cells(node: Node) -> list[Cell]:
    weight, recurrent, operator = node.tensor(1), node.tensor(2), node.operator
    size, count = recurrent.shape[-1], weight.shape[0]
    node.ignore("hidden_size")
    if node.attribute("clip") is not None or node.flag("input_forget") or node.attribute("activation_alpha") is not None:
        raise RefusalError("expected a plain cell, got clip, input_forget or activation_alpha")
    if node.attribute("activation_beta") is not None:
        raise RefusalError("expected a plain cell, got activation_beta")
    names = [
        str(name.decode() if isinstance(name, bytes) else name) for name in node.attribute("activations") or _DEFAULTS[operator] * count
    ]
    unknown = [name for name in names if name.lower() not in _ACTIVATIONS]
    if unknown:
        raise RefusalError(f"expected activations among {', '.join(sorted(_ACTIVATIONS))}, got {unknown[0]}")
    functions, each = [_ACTIVATIONS[name.lower()] for name in names], len(_DEFAULTS[operator])
    gates = _GATES[operator] * size
    biases = node.tensor(3) if node.has(3) else torch.zeros(count, 2 * gates, dtype=weight.dtype)
    peepholes = node.tensor(7) if operator == "LSTM" and node.has(7) else None
    after = operator == "GRU" and node.flag("linear_before_reset")
    return [
        Cell(
            weight[at], recurrent[at], biases[at, :gates], biases[at, gates:], None if peepholes is None else peepholes[at],
            functions[at * each : (at + 1) * each], after,
        )
        for at in range(count)
    ]  # fmt: skip


def _initial(node: Node, index: int, count: int, x: Tensor, cell: Cell, layout: int) -> Tensor:
    if (index == 5 or node.operator == "LSTM") and node.has(index):
        return node.tensor(index).transpose(0, 1) if layout else node.tensor(index)
    return torch.zeros([count, x.shape[1], cell.recurrent.shape[-1]], dtype=x.dtype)


def _run(operator: str, cell: Cell, x: Tensor, h: Tensor, c: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    step = {"LSTM": cell.lstm, "GRU": cell.gru, "RNN": cell.rnn}[operator]
    outputs: list[Tensor] = []
    for item in reversed(x.unbind(0)) if reverse else x.unbind(0):
        h, c = step(item, h, c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h, c
