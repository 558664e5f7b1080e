"""The past of a language model that is read without one."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.frontend.onnx.node import Node, dtype_of
from qcompile.frontend.onnx.registry import OWN, rule


@rule("EmptyPast", domain=OWN)
def empty_past(node: Node) -> Tensor:
    """No keys, or values, [B, L, 0, D] for token ids [B, S]."""
    batch = node.tensor(0).shape[0]
    return torch.zeros((batch, node.integer("heads", 1), 0, node.integer("size", 1)), dtype=dtype_of(node.integer("to", 1)))
