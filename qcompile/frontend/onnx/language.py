"""Causal language models in ONNX: what comes from and goes to a cache is cut off, because the compiler brings its own.

With an empty past `Concat(past, k)` is `k`, and positions count from 0: the model is then the one that a front end for modules traces.
"""

from __future__ import annotations

import re
from dataclasses import replace

from onnx import TensorProto

from qcompile.frontend.onnx.kinds import STORED
from qcompile.frontend.onnx.program import Block, InputSpec, Program, Step, blocks_of
from qcompile.frontend.onnx.registry import OWN

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a causal language model takes, in order; a file may have the first alone."""
OUTPUT = "logits"
_PAST = re.compile(r"past(?=.*\d)(?=.*(key|value|self))")
"""`past_key_values.0.key`, `past.0.value`, `past_key_0`, `past_key_self_0`; what stands beside them is called `.scale`."""
_BATCH, _SEQUENCE = "batch", "sequence"


def language_model(program: Program) -> Program | None:
    """The model with an empty past, from `input_ids`, `attention_mask` and `position_ids` [B, S] to logits, or None if it is none.

    It is one if its inputs are of these names and of a past, and its outputs logits and a present. What attention may see, and where
    positions come from, is another question (`qcompile/frontend/onnx/causal.py`).
    """
    named = {item.name: item for item in program.inputs if item.name in INPUTS}
    past = [item for item in program.inputs if item.name not in named]
    kept = [name for name in program.body.outputs if name == OUTPUT]
    known = all(name == OUTPUT or name.startswith("present") for name in program.body.outputs)
    fits = all(_is_text(item) for item in named.values()) and all(_is_past(item) for item in past)
    if "input_ids" not in named or not kept or not known or not fits:
        return None
    start = [step for item in named.values() for step in _converted(item)]
    renamed = {item.name: f"{item.name}/given" for item in named.values() if _converted(item)}
    start += [_empty(item) for item in past]
    body = program.body
    steps = [*start, *(_reading(step, renamed) for step in body.steps)]
    return replace(
        program,
        inputs=[InputSpec(name, TensorProto.INT64, (_BATCH, _SEQUENCE)) for name in INPUTS],
        body=Block(body.inputs, body.weights, steps, tuple(kept)),
    )


def layers(program: Program) -> int:
    """How many layers have keys in the past."""
    return sum(_PAST.match(item.name) is not None and item.name.endswith("key") for item in program.inputs)


def _is_text(item: InputSpec) -> bool:
    """[B, S] of any sizes that vary."""
    return len(item.shape) == 2 and not any(isinstance(size, int) for size in item.shape) and item.kind in STORED


def _is_past(item: InputSpec) -> bool:
    """[B, L, P, D], of which batch and tokens vary."""
    varies = [not isinstance(size, int) for size in item.shape]
    return _PAST.match(item.name) is not None and item.kind in STORED and varies == [True, False, True, False]


def _converted(item: InputSpec) -> list[Step]:
    """What a model of other integers reads."""
    if item.kind == TensorProto.INT64:
        return []
    return [Step("Cast", "", item.name, (item.name,), (f"{item.name}/given",), {"to": item.kind})]


def _empty(item: InputSpec) -> Step:
    return Step("EmptyPast", OWN, item.name, ("input_ids",), (item.name,), {"heads": item.shape[1], "size": item.shape[3], "to": item.kind})


def _reading(step: Step, names: dict[str, str]) -> Step:
    """The step, and the branches inside, with other names of inputs."""
    if not names:
        return step
    for inner in blocks_of(step):
        inner.steps = [_reading(item, names) for item in inner.steps]
        inner.outputs = tuple(names.get(name, name) for name in inner.outputs)
    return replace(step, inputs=tuple(names.get(name, name) for name in step.inputs))
