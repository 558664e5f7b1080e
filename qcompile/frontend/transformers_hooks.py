"""The one place that touches transformers' semi-private interfaces: attention and experts become single operators in a trace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcompile.errors import UnsupportedModelError

NAME = "qcompile"
_NO_MASK = "sdpa"  # models that call scaled_dot_product_attention by themselves ask for their masks under this name
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
}  # fmt: skip
# Tensors that transformers passes along for other implementations, and that change nothing here.
_IGNORED = ("position_ids", "cache_position", "position_embeddings", "token_type_ids")


@dataclass(frozen=True)
class Mask:
    """What an attention mask says: `padding` [B, T] (nonzero = a real token) or None, causal or not, and the window (0 = none)."""

    padding: Tensor | None
    causal: bool
    window: int = 0


def classify(mask_function: Callable[..., Any]) -> tuple[bool, int] | None:
    """Causality and window of one of transformers' mask functions, read off its closure; None for any other."""
    if mask_function is masking_utils.causal_mask_function:
        return True, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, 0
    parts: tuple[Callable[..., Any], ...] = _closure(mask_function, "mask_functions", "and_masks") or ()
    if len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return None
    window = _closure(parts[0], "sliding_window", "sliding_window_overlay")
    return (True, window) if isinstance(window, int) else None


def _closure(function: Callable[..., Any], variable: str, maker: str) -> Any:
    if not getattr(function, "__qualname__", "").startswith(f"{maker}.<locals>"):
        return None
    names = function.__code__.co_freevars
    return function.__closure__[names.index(variable)].cell_contents if variable in names and function.__closure__ else None


class Hooks(TorchFunctionMode):
    """The three functions that stand in for transformers' own during one trace, and the masks that they have handed out."""

    def __init__(self, name: str) -> None:
        """Start with no masks; `name` is the model in errors."""
        super().__init__()
        self.name = name
        self.masks: dict[int, tuple[Tensor, Mask]] = {}

    def mask(
        self, batch_size: int, q_length: Any, kv_length: Any, q_offset: Any = 0, kv_offset: Any = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function, attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu", **_: Any,
    ) -> Tensor:  # fmt: skip
        """A stand-in for the mask: a tensor whose identity tells `attention` what it means."""
        kind = classify(mask_function)
        if kind is None or not (isinstance(q_offset, int) and q_offset == 0 and isinstance(kv_offset, int) and kv_offset == 0):
            # transformers takes positions without a mask for several sequences in one row.
            remedy = "; pass an attention_mask" if attention_mask is None else ""
            shown = getattr(mask_function, "__qualname__", str(mask_function))
            raise UnsupportedModelError(
                f"{self.name}: expected a full, causal or causal sliding-window attention mask, got {shown}; not served yet{remedy}"
            )
        ones = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
        token = ones if attention_mask is None else attention_mask.detach()
        self.masks[id(token)] = token, Mask(attention_mask, *kind)
        return token

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
        position_bias: Tensor | None = None, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """One attention operator: query [B, H, S, D], key and value [B, L, T, D], result [B, S, H, D]."""
        unknown = [name for name, item in others.items() if isinstance(item, Tensor) and name not in _IGNORED]
        if unknown or dropout:
            raise UnsupportedModelError(
                f"{self.name}: {type(module).__name__}: expected attention of queries, keys, values and a mask, "
                f"got also {unknown or 'dropout'}; not served yet"
            )
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        mask, bias = self._meaning(module, attention_mask, position_bias, causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        result: Tensor = torch.ops.qcompile.attention(
            query, key, value, mask.padding, bias, scale, mask.causal, mask.window, float(softcap or 0.0), s_aux
        )
        return result.transpose(1, 2).contiguous(), None

    def _meaning(self, module: nn.Module, mask: Tensor | None, bias: Tensor | None, causal: bool) -> tuple[Mask, Tensor | None]:
        if mask is None:
            return Mask(None, causal), bias
        if id(mask) in self.masks:
            return self.masks[id(mask)][1], bias
        if mask.dim() != 4:
            raise UnsupportedModelError(
                f"{self.name}: {type(module).__name__}: expected a mask made by transformers' mask functions or one of four dimensions, "
                f"got one of {mask.dim()}; such attention is not served yet"
            )
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        return Mask(None, causal=False), mask if bias is None else mask + bias

    def experts(self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """One operator for a layer of gated experts: hidden_states [M, K], top_k_index and top_k_weights [M, n], result [M, K]."""
        activation = _ACTIVATIONS.get(str(getattr(module.config, "hidden_act", None) or getattr(module.config, "hidden_activation", None)))
        plain = (
            module.has_gate and module.is_concatenated and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        )  # fmt: skip
        if activation is None or not plain or type(module)._apply_gate.__qualname__ != "_default_apply_gate":
            raise UnsupportedModelError(
                f"{self.name}: {type(module).__name__}: expected experts `down(act(gate(x)) * up(x))` without biases, "
                "got others; not served yet"
            )
        result: Tensor = torch.ops.qcompile.moe_experts(
            hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation
        )
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Catch the models that call `scaled_dot_product_attention` by themselves with a mask that came from `mask`."""
        options = dict(kwargs or {})
        if (
            func is not nn.functional.scaled_dot_product_attention
            or id(options.get("attn_mask")) not in self.masks
            or options.get("dropout_p")
        ):
            return func(*args, **options)
        query, key, value = args
        mask = self.masks[id(options["attn_mask"])][1]
        scale = options.get("scale") or query.shape[-1] ** -0.5
        return torch.ops.qcompile.attention(query, key, value, mask.padding, None, scale, mask.causal, mask.window)


@contextlib.contextmanager
def tracing(model: PreTrainedModel, name: str) -> Iterator[Hooks]:
    """Let `model` call the hooks; transformers' registries and the model's configuration are put back afterwards."""
    hooks = Hooks(name)
    direct = not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_entry(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, hooks.attention))
        stack.enter_context(_entry(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, _NO_MASK if direct else NAME, hooks.mask))
        stack.enter_context(_entry(ALL_EXPERTS_FUNCTIONS._global_mapping, NAME, hooks.experts))
        for config in {id(config): config for config in _configs(model)}.values():
            stack.enter_context(_entry(vars(config), "_attn_implementation_internal", _NO_MASK if direct else NAME))
            stack.enter_context(_entry(vars(config), "_experts_implementation_internal", NAME))
            stack.enter_context(_entry(vars(config), "use_cache", value=False))
        if direct:
            stack.enter_context(hooks)
        yield hooks


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            yield config
            yield from (part for part in (getattr(config, key, None) for key in config.sub_configs) if part is not None)


@contextlib.contextmanager
def _entry(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    missing = object()
    before = mapping.get(key, missing)
    mapping[key] = value
    try:
        yield
    finally:
        if before is missing:
            del mapping[key]
        else:
            mapping[key] = before
