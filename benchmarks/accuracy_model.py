"""The model of the accuracy table as a Hugging Face directory, so that every library reads the same; also in another basis.

python benchmarks/accuracy_model.py OUT [--rotated SEED]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qcompile.frontend.pinned import smollm2_path


def write_directory(out: Path, seed: int | None = None) -> Path:
    """SmolLM2 in float32 under `out`; with `seed`, the residual stream in a random orthogonal basis: the same function, other weights."""
    path = smollm2_path()
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights = read.state_dict()
    settings = {key: value for key, value in read.config.to_dict().items() if key not in ("model_type", "quantization_config")}
    config = AutoConfig.for_model(read.config.model_type, **settings)
    if seed is not None:
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
        config.tie_word_embeddings = False
        rotate(weights, orthogonal(config.hidden_size, seed))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return out


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size] in float64, uniformly distributed."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def rotate(weights: dict[str, Tensor], basis: Tensor) -> None:
    """Put the residual stream of a llama model into another basis, in place; the gains of its norms go into the weights behind them."""
    gains = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    layers = sorted({name.rsplit(".input_layernorm", 1)[0] for name in weights if ".input_layernorm" in name})
    readers = {
        f"{layer}.{norm}.weight": [f"{layer}.{reader}.weight" for reader in read] for layer in layers for norm, read in gains.items()
    }
    readers["model.norm.weight"] = ["lm_head.weight"]
    for norm, names in readers.items():
        for name in names:
            weights[name] = ((weights[name].double() * weights[norm].double()) @ basis).float()
        weights[norm] = torch.ones_like(weights[norm])
    weights["model.embed_tokens.weight"] = (weights["model.embed_tokens.weight"].double() @ basis).float()
    for layer in layers:
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"{layer}.{writer}.weight"
            weights[name] = (basis.T @ weights[name].double()).float()


def main() -> None:
    """Write the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rotated", type=int, metavar="SEED")
    options = parser.parse_args()
    print(write_directory(options.out, options.rotated))


if __name__ == "__main__":
    main()
