"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.values import RefusalError


@rule("LayerNormalization")
def layer_norm(node: Node) -> tuple[Any, ...]:
    """Over the axes from `axis` on; also the mean and 1 / the deviation, where they are wanted."""
    x, gain, bias = node.tensor(0), node.tensor(1), node.optional(2)
    axis, epsilon = node.integer("axis", -1) % x.dim(), node.real("epsilon", 1e-5)
    node.ignore("stash_type")
    shape = list(x.shape[axis:])
    if list(gain.shape) == shape and (bias is None or list(bias.shape) == shape):
        result = F.layer_norm(x, shape, gain, bias, epsilon)
    else:
        result = F.layer_norm(x, shape, None, None, epsilon) * gain
        result = result if bias is None else result + bias
    if not node.wants(1) and not node.wants(2):
        return (result,)
    over = list(range(axis, x.dim()))
    variance = torch.var(x, over, correction=0, keepdim=True)
    return result, x.mean(over, keepdim=True), torch.rsqrt(variance + epsilon)


@rule("RMSNormalization")
def rms_norm_node(node: Node) -> Tensor:
    """X / sqrt(mean(x²) + ε) · gain, over the axes from `axis` on."""
    x, gain = node.tensor(0), node.tensor(1)
    axis, epsilon = node.integer("axis", -1) % x.dim(), node.real("epsilon", 1e-5)
    node.ignore("stash_type")
    return rms_norm(x, gain, epsilon, axis)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float, axis: int = -1) -> Tensor:
    """The compiler's operator over the last axis, spelled out over several."""
    axis = axis % x.dim()
    if axis == x.dim() - 1 and gain.dim() == 1 and gain.shape[0] == x.shape[-1]:
        normed: Tensor = torch.ops.qcompile.rms_norm(x, gain, epsilon, 0.0)
        return normed
    return x * torch.rsqrt(x.square().mean(list(range(axis, x.dim())), keepdim=True) + epsilon) * gain


@rule("BatchNormalization")
def batch_norm(node: Node) -> Tensor:
    """By stored means and variances; training is refused."""
    if node.flag("training_mode") or not node.flag("spatial", True):
        raise RefusalError("expected inference, one mean per channel, got training_mode or spatial=0")
    node.ignore("momentum")
    x, gain, bias, mean, variance = node.tensors()
    return F.batch_norm(x, mean, variance, gain, bias, False, 0.0, node.real("epsilon", 1e-5))


@rule("InstanceNormalization")
def instance_norm(node: Node) -> Tensor:
    """Per sample and channel."""
    x, gain, bias = node.tensors()
    return F.instance_norm(x, weight=gain, bias=bias, eps=node.real("epsilon", 1e-5))


@rule("GroupNormalization")
def group_norm(node: Node) -> Tensor:
    """Per sample and group of channels; before opset 21 gain and bias are per group."""
    x, gain, bias = node.tensors()
    groups, epsilon = int(node.required("num_groups")), node.real("epsilon", 1e-5)
    node.ignore("stash_type")
    if node.opset < 21:
        each = x.shape[1] // groups
        gain, bias = gain.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, gain, bias, epsilon)


@rule("LpNormalization")
def lp_normalization(node: Node) -> Tensor:
    """Divided by the norm along one axis; 0 stays 0."""
    x, power = node.tensor(0), node.integer("p", 2)
    axis = node.integer("axis", -1)
    if power not in (1, 2):
        raise RefusalError(f"expected p 1 or 2, got {power}")
    norm = x.abs().sum(axis, keepdim=True) if power == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@rule("LRN")
def local_response(node: Node) -> Tensor:
    """X / (bias + alpha/size · sum of squares of neighbouring channels)^beta."""
    x, size = node.tensor(0), int(node.required("size"))
    alpha, beta, bias = node.real("alpha", 1e-4), node.real("beta", 0.75), node.real("bias", 1.0)
    below = (size - 1) // 2
    padded = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [below, size - 1 - below])
    total = torch.stack([padded.narrow(1, offset, x.shape[1]) for offset in range(size)]).sum(0)
    return x / (total * (alpha / size) + bias).pow(beta)
