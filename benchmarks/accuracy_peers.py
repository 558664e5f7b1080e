"""One row of the accuracy table by another library: the model is quantized in place, then measured beside the float model.

    python -m benchmarks.accuracy_peers METHOD --model DIR --calib TOKENS.npy --eval TOKENS.npy

Runs in an environment that has the library; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcompile.evaluation import LogitsFunction, evaluate

GROUP = 64
SYMMETRIC_BITS = 16 / GROUP
"""A 16-bit scale per group."""
Peer = Callable[[nn.Module, Tensor, Path], float]
"""Quantizes a model in place, given tokens [W, S] and its directory; returns the stored bits per weight."""


def llm_compressor_gptq(bits: int) -> Peer:
    """GPTQ as llm-compressor's `GPTQModifier` does it, symmetric groups."""

    def quantize(model: nn.Module, tokens: Tensor, directory: Path) -> float:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier

        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
        oneshot(
            model=model, tokenizer=str(directory), dataset=data, recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
            max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens),
        )  # fmt: skip
        return bits + SYMMETRIC_BITS

    return quantize


def llm_compressor_w8a8(model: nn.Module, tokens: Tensor, directory: Path) -> float:
    """SmoothQuant and GPTQ, int8 weights per channel, int8 activations per token."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    recipe = [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    oneshot(
        model=model, tokenizer=str(directory), dataset=data, recipe=recipe, max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )  # fmt: skip
    return 8 + _per_channel(model)


def auto_round(bits: int, steps: int) -> Peer:
    """AutoRound: rounding learned by signed gradient descent, block by block."""

    def quantize(model: nn.Module, tokens: Tensor, directory: Path) -> float:
        from auto_round import AutoRound

        tokenizer = AutoTokenizer.from_pretrained(directory)
        data = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in tokens]
        rounding = AutoRound(
            model, tokenizer, bits=bits, group_size=GROUP, sym=True, iters=steps, dataset=data, seqlen=tokens.shape[1],
            nsamples=len(tokens), batch_size=min(8, len(tokens)), device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        rounding.quantize()
        return bits + SYMMETRIC_BITS

    return quantize


def torchao_weights(bits: int, algorithm: str) -> Peer:
    """Torchao's integer weights; `algorithm` is `affine` (nearest) or `hqq_scale_only`."""

    def quantize(model: nn.Module, tokens: Tensor, directory: Path) -> float:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), intx_choose_qparams_algorithm=algorithm
        )
        quantize_(model, config, filter_fn=_is_body)
        return bits + SYMMETRIC_BITS

    return quantize


def torchao_w8a8(model: nn.Module, tokens: Tensor, directory: Path) -> float:
    """Torchao's int8 weights per channel with int8 activations per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_body)
    return 8 + _per_channel(model)


def torchao_8da4w(model: nn.Module, tokens: Tensor, directory: Path) -> float:
    """Torchao's int4 weights in groups with int8 activations per token."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    quantize_(model, config, filter_fn=_is_body)
    return 4 + SYMMETRIC_BITS


def model_optimizer_awq(model: nn.Module, tokens: Tensor, directory: Path) -> float:
    """Model-Optimizer's AWQ (a search of scales), int4 in groups."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    _set_block_size(config)
    with torch.no_grad():
        mtq.quantize(model, config, lambda quantized: [quantized(window[None]) for window in tokens])
    return 4 + SYMMETRIC_BITS


def _set_block_size(config: Any) -> None:
    """Groups of 64 wherever the preset says 128."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ():
        if key == -1 and value == 128:
            config[key] = GROUP
        else:
            _set_block_size(value)


def hqq(bits: int) -> Peer:
    """HQQ: half-quadratic optimisation of the zero point, without data; asymmetric, so with two 16-bit numbers per group."""

    def quantize(model: nn.Module, tokens: Tensor, directory: Path) -> float:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
        return bits + 2 * SYMMETRIC_BITS

    return quantize


def _is_body(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _per_channel(model: nn.Module) -> float:
    """Bits per weight of a 16-bit scale per output channel."""
    shapes = [module.weight.shape for name, module in model.named_modules() if hasattr(module, "weight") and name.endswith("_proj")]
    return 16 * sum(shape[0] for shape in shapes) / sum(shape.numel() for shape in shapes)


PEERS: dict[str, Peer] = {
    "llm-compressor-gptq-w4": llm_compressor_gptq(4),
    "model-optimizer-awq-w4": model_optimizer_awq,
    "auto-round-w4": auto_round(4, 50),
    "torchao-nearest-w4": torchao_weights(4, "affine"),
    "torchao-hqq-w4": torchao_weights(4, "hqq_scale_only"),
    "hqq-w4": hqq(4),
    "llm-compressor-gptq-w3": llm_compressor_gptq(3),
    "auto-round-w3": auto_round(3, 50),
    "torchao-hqq-w3": torchao_weights(3, "hqq_scale_only"),
    "hqq-w2": hqq(2),
    "llm-compressor-smoothquant-w8a8": llm_compressor_w8a8,
    "torchao-w8a8": torchao_w8a8,
    "torchao-w4a8": torchao_8da4w,
}


def read(path: Path, windows: int | None) -> Tensor:
    """The first windows of a token array."""
    return torch.from_numpy(np.load(path).astype(np.int64))[:windows]


def distance(logits: LogitsFunction, model: Path, text: Tensor) -> dict[str, Any]:
    """KL from the float model in this directory, and both perplexities."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result = evaluate(logits, text, lambda ids: reference(ids).logits)
    return {"kl": result.kl, "perplexity": result.perplexity, "float_perplexity": result.reference_perplexity}


def main() -> None:
    """Quantize, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, help="without it nothing is measured but time and memory")
    parser.add_argument("--windows", type=int, help="calibrate and measure on this many windows only")
    options = parser.parse_args()
    calibration = read(options.calib, options.windows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    started, used = time.perf_counter(), time.process_time()
    bits = PEERS[options.method](model, calibration, options.model)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured = {"bits": bits, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}
    if options.eval is not None:
        measured |= distance(lambda ids: model(ids).logits.float(), options.model, read(options.eval, options.windows))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
