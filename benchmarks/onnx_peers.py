"""Float models as `torch.onnx` writes them, with a cache, and what onnxruntime's own quantizer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

BLOCK = 64
"""Input columns that share a scale: as in our `cpu-int4`."""


class WithCache(nn.Module):
    """A causal language model whose past and present are plain tensors [B, L, P, D], two for each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap it."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits [B, S, V] and the present."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        positions = (attention_mask.cumsum(-1) - 1)[:, -input_ids.shape[1] :]
        given = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return (given.logits, *(part for layer in given.past_key_values.layers for part in (layer.keys, layer.values)))


def float_model(directory: Path, path: Path) -> Path:
    """Export a Hugging Face directory with `torch.onnx`; names of inputs and outputs are those of our own files."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    past = [torch.zeros(2, heads, 3, config.head_dim) for _ in range(2 * layers)]
    kinds = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    batch, sequence, before = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "sequence", "past_sequence"))
    shapes = {
        "input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: torch.export.Dim.DYNAMIC},
        "past": [{0: batch, 2: before} for _ in past],
    }  # fmt: skip
    torch.onnx.export(
        WithCache(model), (), str(path), dynamo=True, external_data=False, opset_version=21, verbose=False,
        kwargs={"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 7, dtype=torch.long), "past": past},
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{kind}" for kind in kinds)],
        output_names=["logits", *(f"present.{kind}" for kind in kinds)], dynamic_shapes=shapes,
    )  # fmt: skip
    return path


def quantized_model(source: Path, path: Path, accuracy_level: int) -> Path:
    """The float file through `onnxruntime.quantization.matmul_nbits_quantizer`: 4 bits, symmetric, blocks of `BLOCK`; not the head."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    head = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")][-1]
    quantizer = MatMulNBitsQuantizer(
        model, block_size=BLOCK, is_symmetric=True, accuracy_level=accuracy_level or None, nodes_to_exclude=[head]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)
    return path
