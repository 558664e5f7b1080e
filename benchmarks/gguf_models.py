"""Models as GGUF files that llama.cpp and qcompile read alike: rotated ones, random ones, and what llama.cpp quantizes.

    python -m benchmarks.gguf_models rotate IN.gguf OUT.gguf [--seed 1]
    python -m benchmarks.gguf_models random IN.gguf OUT.gguf
    python -m benchmarks.gguf_models quantize IN.gguf OUT.gguf --type Q4_1

`rotate` puts the residual stream of a llama model into another orthogonal basis: the same function, other weights. `random` takes only
tokenizer and settings from the file, and has as many weights as a model of a billion. Both write matrices in 16 bits, head and embedding
apart. `quantize` is llama.cpp's own.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy_model import orthogonal

Part = tuple[str, tuple[int, ...], Callable[[], Tensor]]
"""A tensor of a file: name, shape, and what makes it."""
GAINS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
"""Norm of a block -> the matrices behind it."""
WRITERS = ("attn_output", "ffn_down")
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "IQ4_NL": 25}
"""llama.cpp's types of 4 bits, as `llama_ftype` numbers them."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama model."""

    hidden: int = 2048
    layers: int = 16
    intermediate: int = 8192
    heads: int = 32
    key_heads: int = 8

    def settings(self) -> dict[str, int]:
        """As a GGUF file names them."""
        size = self.hidden // self.heads
        return {
            "llama.embedding_length": self.hidden, "llama.block_count": self.layers, "llama.feed_forward_length": self.intermediate,
            "llama.attention.head_count": self.heads, "llama.attention.head_count_kv": self.key_heads,
            "llama.attention.key_length": size, "llama.attention.value_length": size, "llama.rope.dimension_count": size,
        }  # fmt: skip

    def matrices(self, vocabulary: int) -> dict[str, tuple[int, int]]:
        """Name -> rows and columns."""
        narrow = self.hidden // self.heads * self.key_heads
        block = {
            "attn_q": (self.hidden, self.hidden), "attn_k": (narrow, self.hidden), "attn_v": (narrow, self.hidden),
            "attn_output": (self.hidden, self.hidden), "ffn_gate": (self.intermediate, self.hidden),
            "ffn_up": (self.intermediate, self.hidden), "ffn_down": (self.hidden, self.intermediate),
        }  # fmt: skip
        ends = {"token_embd": (vocabulary, self.hidden), "output": (vocabulary, self.hidden)}
        return {f"{name}.weight": shape for name, shape in ends.items()} | {
            f"blk.{layer}.{name}.weight": shape for layer in range(self.layers) for name, shape in block.items()
        }


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """The tensors of a file by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> Tensor:
    """The numbers of a tensor in float32, [rows, columns]."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def write(source: Path, out: Path, parts: list[Part], settings: dict[str, int] | None = None) -> Path:
    """A file with these tensors, matrices in float16, and the metadata of another but for these settings."""
    writer = gguf.GGUFWriter(out, "llama")
    changed = dict(settings or {})
    for name, field in gguf.GGUFReader(source).fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type", *changed):
            inside = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inside)
    for name, value in changed.items():
        writer.add_uint32(name, value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, shape, _ in parts:
        kind = np.dtype(np.float16 if len(shape) == 2 else np.float32)
        writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, make in parts:
        made = make().to(torch.float16 if len(shape) == 2 else torch.float32)
        writer.write_tensor_data(made.contiguous().numpy())
    writer.close()
    return out


def rotated(source: Path, out: Path, seed: int = 1) -> Path:
    """The model in a random orthogonal basis; gains of norms go into the matrices behind them."""
    tensors = tensors_of(source)
    if "output.weight" not in tensors:
        tensors["output.weight"] = tensors["token_embd.weight"]
    basis = orthogonal(int(tensors["token_embd.weight"].shape[0]), seed)
    behind = {"output": "output_norm.weight"} | {reader: f"{{}}.{norm}.weight" for norm, readers in GAINS.items() for reader in readers}

    def make(name: str) -> Tensor:
        block, _, kind = name.removesuffix(".weight").rpartition(".")
        value = values_of(tensors[name]).double()
        if kind.endswith("norm"):
            return torch.ones_like(value)
        if kind in behind:
            value = value * values_of(tensors[behind[kind].format(block)]).double()
        return basis.T @ value if kind in WRITERS else value @ basis

    parts: list[Part] = []
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        parts.append((name, shape, lambda name=name: make(name)))  # type: ignore[misc]
    return write(source, out, parts)


def random_model(source: Path, out: Path, shape: Shape | None = None) -> Path:
    """Normal weights that keep the size of what passes through, with the tokenizer of `source`."""
    shape = shape or Shape()
    vocabulary = int(tensors_of(source)["token_embd.weight"].shape[1])
    drawn = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Callable[[], Tensor]:
        return lambda: torch.randn(rows, columns, generator=drawn) * columns**-0.5

    norms = ["output_norm.weight", *(f"blk.{layer}.{norm}.weight" for layer in range(shape.layers) for norm in GAINS)]
    parts: list[Part] = [(name, sizes, matrix(*sizes)) for name, sizes in shape.matrices(vocabulary).items()]
    parts += [(name, (shape.hidden,), lambda: torch.ones(shape.hidden)) for name in norms]
    return write(source, out, parts, shape.settings())


def quantize(source: Path, out: Path, kind: str, threads: int = 0) -> Path:
    """What llama.cpp makes of a float file in a type of `TYPES`."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[kind], threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        sys.exit(f"benchmarks.gguf_models: {source}: expected llama.cpp to quantize it to {kind}, got a failure; see its messages above")
    return out


def body_bits(path: Path) -> float:
    """Bits of a weight of the blocks' matrices."""
    body = [tensor for name, tensor in tensors_of(path).items() if name.startswith("blk.") and len(tensor.shape) == 2]
    return 8 * sum(int(tensor.n_bytes) for tensor in body) / sum(int(tensor.n_elements) for tensor in body)


def bytes_of_a_token(path: Path) -> int:
    """Bytes of the weights that each token reads: all but an embedding that is no head."""
    tensors = tensors_of(path)
    return sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name != "token_embd.weight" or "output.weight" not in tensors)


def kinds_of(path: Path) -> Iterator[tuple[str, int]]:
    """Storage types of a file's matrices, and how many there are."""
    found: dict[str, int] = {}
    for tensor in tensors_of(path).values():
        if len(tensor.shape) == 2:
            found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + 1
    yield from sorted(found.items())


def main() -> None:
    """Write a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rotate", "random", "quantize"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--type", choices=TYPES, default="Q4_1")
    options = parser.parse_args()
    made: dict[str, Callable[[], Any]] = {
        "rotate": lambda: rotated(options.source, options.out, options.seed),
        "random": lambda: random_model(options.source, options.out),
        "quantize": lambda: quantize(options.source, options.out, options.type),
    }
    made[options.what]()
    print(options.out, ", ".join(f"{count} {kind}" for kind, count in kinds_of(options.out)), f"{body_bits(options.out):.2f} bits")


if __name__ == "__main__":
    main()
