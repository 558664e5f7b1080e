"""The hooks that stand in for transformers' attention, masks and experts: exact, scoped, and refusing what they cannot express."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcompile.errors import UnsupportedModelError
from qcompile.frontend.transformers_hooks import Hooks, classify, tracing
from tests.models import tiny

_REGISTRIES = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)


def _heads() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masking_utils.causal_mask_function, (True, 0)),
        (masking_utils.bidirectional_mask_function, (False, 0)),
        (masking_utils.sliding_window_causal_mask_function(7), (True, 7)),
        (masking_utils.sliding_window_bidirectional_mask_function(7), None),
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(2)), None),
        (masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function), None),
        (lambda *_: True, None),
    ],
)
def test_masks_are_told_apart(function: Any, expected: tuple[bool, int] | None) -> None:
    assert classify(function) == expected


def test_a_mask_that_is_not_served() -> None:
    function = masking_utils.chunked_causal_mask_function(4, torch.zeros(2))
    with pytest.raises(
        UnsupportedModelError, match=r"model: expected a full, causal or causal sliding-window attention mask, got and_masks"
    ):
        Hooks("model").mask(2, 5, 5, mask_function=function)
    with pytest.raises(UnsupportedModelError, match=r"expected a full, causal or causal sliding-window attention mask"):
        Hooks("model").mask(2, 5, 5, q_offset=3)


def test_two_masks_over_one_padding_stay_apart() -> None:
    hooks = Hooks("model")
    padding = torch.ones(2, 5, dtype=torch.bool)
    full = hooks.mask(2, 5, 5, mask_function=masking_utils.causal_mask_function, attention_mask=padding)
    near = hooks.mask(2, 5, 5, mask_function=masking_utils.sliding_window_causal_mask_function(2), attention_mask=padding)
    q, k, v = _heads()
    expected = [torch.ops.qcompile.attention(q, k, v, padding, None, 8**-0.5, True, window).transpose(1, 2) for window in (0, 2)]
    found = [hooks.attention(nn.Identity(), q, k, v, mask)[0] for mask in (full, near)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found[0], found[1])


def test_sinks_softcap_and_scale_reach_the_operator() -> None:
    q, k, v = _heads()
    sinks = torch.randn(4)
    found, _ = Hooks("model").attention(nn.Identity(), q, k, v, None, scaling=0.3, softcap=2.0, s_aux=sinks)
    expected = torch.ops.qcompile.attention(q, k, v, None, None, 0.3, True, 0, 2.0, sinks)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_of_the_models_own_becomes_a_bias(boolean: bool) -> None:
    q, k, v = _heads()
    keep = torch.rand(2, 1, 5, 5) > 0.3
    mask = keep if boolean else torch.zeros(2, 1, 5, 5).masked_fill(~keep, -torch.inf)
    bias = torch.randn(1, 4, 5, 5)
    found, _ = Hooks("model").attention(nn.Identity(), q, k, v, mask, position_bias=bias)
    repeated = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
    expected = nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=bias.masked_fill(~keep, -torch.inf)).nan_to_num()
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_an_unknown_tensor_beside_attention_is_refused() -> None:
    q, k, v = _heads()
    with pytest.raises(UnsupportedModelError, match=r"model: Identity: .* got also \['gate'\]; not served yet"):
        Hooks("model").attention(nn.Identity(), q, k, v, None, gate=torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=r"got also dropout"):
        Hooks("model").attention(nn.Identity(), q, k, v, None, dropout=0.1)
    with pytest.raises(
        UnsupportedModelError, match=r"expected a mask made by transformers' mask functions or one of four dimensions, got one of 2"
    ):
        Hooks("model").attention(nn.Identity(), q, k, v, torch.ones(2, 5))


def test_experts_with_biases_are_refused() -> None:
    class Experts(nn.Module):
        config = SimpleNamespace(hidden_act="silu")
        has_gate = is_concatenated = has_bias = True
        is_transposed = has_post_expert_norm = False

    with pytest.raises(UnsupportedModelError, match=r"model: Experts: expected experts .* without biases, got others"):
        Hooks("model").experts(Experts(), torch.ones(1), torch.ones(1), torch.ones(1))


def _fail_while_tracing(model: nn.Module) -> None:
    with tracing(model, "model"):
        assert model.config._attn_implementation == "qcompile"
        assert "qcompile" in ALL_ATTENTION_FUNCTIONS
        raise ZeroDivisionError


def test_registration_ends_with_the_trace() -> None:
    before = [dict(registry._global_mapping) for registry in _REGISTRIES]
    model = tiny("gemma2")
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        _fail_while_tracing(model)
    assert [dict(registry._global_mapping) for registry in _REGISTRIES] == before
    assert model.config._attn_implementation == implementation
