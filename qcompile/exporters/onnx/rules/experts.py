"""Mixtures of experts: every expert reads every token, and what was not chosen weighs nothing."""

from __future__ import annotations

from qcompile.exporters.onnx.emitter import Call, Emitter, Value
from qcompile.exporters.onnx.rules.elementwise import activation
from qcompile.exporters.onnx.rules.table import rule


@rule("qcompile.moe_experts.default")
def moe_experts(e: Emitter, node: Call) -> Value:
    """`Σ_e weight_e(x) · down_e(act(gate_e x) · up_e x)`; x [M, K], chosen experts and weights [M, n].

    The graph computes only what was chosen; ONNX has no operator for that which every runtime serves.
    """
    x, chosen, weights, gate_up, down, name = node.args
    dtype = e.dtype(x)
    experts, both, _ = e.shape(gate_up)
    hidden = e.op("MatMul", e.op("Unsqueeze", e.value(x), e.ints([0])), e.swap_last(e.value(gate_up), 3))  # [E, M, 2I]
    gate, up = e.ops("Split", hidden, e.ints([both // 2, both // 2]), count=2, axis=-1)
    made = e.op("MatMul", e.op("Mul", activation(e, str(name), gate, dtype), up), e.swap_last(e.value(down), 3))  # [E, M, K]
    numbers = e.reshape(e.ints(range(int(experts))), [-1, 1, 1])
    mine = e.op("Equal", e.op("Unsqueeze", e.value(chosen), e.ints([0])), numbers)  # [E, M, n]
    share = e.op("Mul", e.cast(mine, dtype), e.op("Unsqueeze", e.value(weights, dtype), e.ints([0])))
    total = e.op("ReduceSum", share, e.ints([-1]), keepdims=1)
    return e.op("ReduceSum", e.op("Mul", made, total), e.ints([0]), keepdims=0)
