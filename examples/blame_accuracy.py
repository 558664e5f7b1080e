"""Where a compiled model's loss comes from: each quantizer switched off, and on alone, by layer and kind, ranked.

One layer is given outliers, as trained models have them, by a change that leaves its function alone. Blame names the weight that cannot be
rounded any more, and leaving that one alone takes most of the loss away.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile

LAYERS, LAYER = 4, 2
TARGET = "cpu-w4a8-kv4"


def model() -> nn.Module:
    """A small language model with random weights; in one layer a few channels of the MLP are made small, then read by large weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=256, **sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # wider than at the start of training: logits that say something
        mlp = made.model.layers[LAYER].mlp
        mlp.up_proj.weight[::40] /= 30
        mlp.down_proj.weight[:, ::40] *= 30
    return made


def main() -> None:
    """Compile, blame, and compile again without what is to blame."""
    source = model()
    tokens = torch.randint(0, 256, (2, 64))
    compiled = qcompile.compile(source, TARGET, recipe="nearest", max_context=128)
    found = qcompile.blame(compiled, source, tokens=tokens, windows=2, budget=60)
    print(found)

    worst = next(cell.node for cell in found.cells if cell.kind == "weights" and cell.node)
    spared = qcompile.compile(source, TARGET, recipe="nearest", max_context=128, ignore=[worst])
    left = qcompile.blame(spared, source, tokens=tokens, windows=2, budget=12)
    print(f"with {worst} left alone: KL {left.total:.4f} in place of {found.total:.4f}")


if __name__ == "__main__":
    main()
