"""A compiled model: called, generating, saved, reported; each verb is served by the room that does it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile.errors import QCompileError, SourceError
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Engine
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.ir.records import Assets, CoverageRow, MemoryPlan, PassRecord
from qcompile.ir.structure import flatten, unflatten
from qcompile.runtime.artifact import ArtifactContents, load_artifact, save_artifact
from qcompile.runtime.cache_layers import CacheLayer, cache_layers
from qcompile.runtime.engines import default_engine, has_onnxruntime, make_engine, require_known, require_onnxruntime
from qcompile.target import Target, parse_target

if TYPE_CHECKING:
    from qcompile.dump.html.notebook import Report
    from qcompile.exporters.onnx import OnnxFile

DEFAULT_CONTEXT = 2048
_UNLIMITED = 1 << 40
"""A context that only the bytes of a cache limit."""


class CompiledModel:
    """A model that runs without its code. Made by `qcompile.compile` and `qcompile.load`."""

    def __init__(
        self, contents: ArtifactContents, *, max_batch: int = 1, max_context: int | None = None, kv_bytes: int | None = None,
        page_tokens: int | None = None, share_prefixes: bool = False, device: str | None = None, engine: str | None = None,
    ) -> None:  # fmt: skip
        """Hold an artifact's contents; the engine is made when it is first needed.

        Args:
            contents: graph, plan, kernels and weights.
            max_batch: sequences that are served at once.
            max_context: the most tokens of a sequence; by default what the model was made for, and at most 2048 without `kv_bytes`.
            kv_bytes: size of the cache in bytes, page tables included; its pages are shared by all sequences, whatever their lengths.
                By default every sequence has room for `max_context` tokens.
            page_tokens: tokens of a page of the cache, rounded up to whole groups of its format; by default a sequence is one page
                without `kv_bytes`, and pages have 64 tokens or fewer with it.
            share_prefixes: let prompts that begin alike share what they have in common; logits may differ in their last bits.
            device: such as `cuda:0` or `cpu`; by default what the target asks for, if it is here.
            engine: `reference`, `torch_cpu`, `native`, `cuda` or `onnxruntime` in place of the target's own.

        Raises:
            CapacityError: if the cache has no room for a page for each sequence.
        """
        self.contents = contents
        self.max_batch, self.kv_bytes, self.page_tokens, self.share_prefixes = max_batch, kv_bytes, page_tokens, share_prefixes
        self.max_context = self._context(max_context)
        self._device, self._engine_name = device, engine
        self._engine: Engine | None = None
        self._onnx: Path | None = None

    def _context(self, max_context: int | None) -> int:
        """The most tokens of a sequence, once the cache is laid out."""
        from qcompile.runtime.cache_layout import layout_of

        most = self.assets.max_positions or (DEFAULT_CONTEXT if self.kv_bytes is None else _UNLIMITED)
        wanted = min(most, DEFAULT_CONTEXT) if self.kv_bytes is None else most
        return layout_of(
            self.contents.plan.entries.get("decode"), max_batch=self.max_batch, kv_bytes=self.kv_bytes, page_tokens=self.page_tokens,
            max_context=wanted if max_context is None else max_context,
        ).capacity  # fmt: skip

    @property
    def graph(self) -> Graph:
        """The final graph, before lowering."""
        return self.contents.graph

    @property
    def target(self) -> Target:
        """The preset it was compiled for; what options changed shows in `cache_layers`, `coverage` and `pipeline`."""
        return parse_target(self.contents.target)

    @property
    def assets(self) -> Assets:
        """Tokenizer files, end-of-sequence ids, and such."""
        return self.contents.assets

    @property
    def records(self) -> list[PassRecord]:
        """What each pass did."""
        return self.contents.records

    @property
    def coverage(self) -> list[CoverageRow]:
        """Format and kernel of every linear, embedding and attention, or why it was left alone."""
        return self.contents.coverage

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return self.contents.weight_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Everything stored for the quantized matrices over their elements; None if nothing is quantized."""
        from qcompile.runtime.accounting import bits_per_weight

        return bits_per_weight(self.contents.constants, self.contents.plan)

    @property
    def matmul(self) -> str | None:
        """How linears with quantized weights multiply: `exact (float32 activations)`, `fast (int8 activations per group of 32)`."""
        return self.contents.matmul

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token of one sequence takes over all layers."""
        from qcompile.runtime.accounting import cache_bytes_per_token

        return cache_bytes_per_token(self.contents.plan)

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes of cache that a sequence takes beside its tokens' over all layers: the first and the recent tokens in 16 bits."""
        from qcompile.runtime.accounting import cache_bytes_per_sequence

        return cache_bytes_per_sequence(self.contents.plan)

    @property
    def memory_plan(self) -> MemoryPlan:
        """Bytes that the engine holds, by purpose: weights, cache, page tables, intermediates; prepares the engine."""
        return self.engine.memory

    @property
    def cache_layers(self) -> list[CacheLayer]:
        """Forms, bytes and kernel of each attention's cache; empty for a model without one."""
        return cache_layers(self.contents.plan)

    @property
    def engine(self) -> Engine:
        """What runs the plan, made on first use."""
        if self._engine is None:
            # Engines lay a plan out anew where its arena is too small for them; the contents stay what was compiled.
            contents = self.contents
            name = self._engine_name or default_engine(contents, self._device)
            if name == "onnxruntime":
                require_onnxruntime()  # before anything is exported for it
            self._engine = make_engine(
                contents, name=name, device=self._device, max_batch=self.max_batch, max_context=self.max_context,
                page_tokens=self.page_tokens, kv_bytes=self.kv_bytes, share_prefixes=self.share_prefixes,
                onnx_model=self._onnx_model() if name == "onnxruntime" else None,
            )  # fmt: skip
        return self._engine

    def _onnx_model(self) -> Path:
        """The ONNX file of the graph: the artifact's own, verified, or one that is made now."""
        if self.contents.onnx is not None:
            return self.contents.onnx.verified()
        if self._onnx is None:
            self._onnx = onnx_exporter("engine onnxruntime").serving_file(self.contents)
        return self._onnx

    @property
    def is_causal_lm(self) -> bool:
        """Whether it has a cache and can generate."""
        return "decode" in self.contents.plan.entries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: what the model was traced with goes in, what it returned comes out, a ModelOutput as a plain dict.

        A language model takes `input_ids` [B, S] and optionally `attention_mask` and `position_ids`, and returns {"logits": [B, S, V]}.
        """
        if self.is_causal_lm:
            return {"logits": self.engine.forward(lm_inputs(*args, **kwargs))[0]}
        leaves = flatten(self.graph.interface.inputs, (args, kwargs))
        self.graph.require_inputs(leaves)
        names = [node.name for node in self.graph.placeholders]
        return unflatten(self.graph.interface.outputs, self.engine.forward(dict(zip(names, leaves, strict=True))))

    def generate(self, prompt: Any, *, max_new_tokens: int = 128, stream: bool = False, **options: Any) -> Any:
        """Continue a text, a conversation, or token ids.

        Args:
            prompt: a text (gives a text), a list of texts (a list), chat messages `[{"role": …, "content": …}]` (a text), or ids
                [B, S] or ragged lists (a list of lists of new tokens).
            max_new_tokens: at most so many per sequence.
            stream: yield pieces of text as they come (one text or conversation).
            **options: `stop` (strings), `stop_tokens`, `ignore_eos`, and `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `seed` of `qcompile.runtime.sampling.SamplingParameters`.

        Raises:
            CapacityError: for a prompt longer than the cache.
            TokenizerError: for text where the model carries no tokenizer or chat template.
        """
        if not self.is_causal_lm:
            raise QCompileError(f"generate: expected a causal language model, got {self.assets.model_type or 'a module'}; call it instead")
        from qcompile.runtime.generate import Generator
        from qcompile.runtime.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.assets) if "tokenizer.json" in self.assets.files else None
        run = Generator(self.engine, tokenizer, self.assets.eos_token_ids)
        result: str | list[Any] | Iterator[str] = run(prompt, max_new_tokens=max_new_tokens, stream=stream, **options)
        return result

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the artifact to the directory `path`, whole or not at all; for a target `onnx-*` with `model.onnx` in it.

        Raises:
            ArtifactError: if `path` exists and `overwrite` is not set.
        """
        onnx_model = self._onnx_model() if self.target.is_onnx else None
        save_artifact(path, self.contents, overwrite=overwrite, onnx_model=onnx_model)

    def export_onnx(
        self, path: str | os.PathLike[str], *, profile: str = "portable", opset: int | None = None, external_data: bool | None = None,
        accuracy_level: int = 0, genai: bool = False, overwrite: bool = False, compare: bool = True,
    ) -> OnnxFile:  # fmt: skip
        """Write an ONNX file and compare what onnxruntime makes of it with the graph; see `docs/onnx.md`.

        Args:
            path: a file that ends in `.onnx`, or a directory for `model.onnx`.
            profile: `portable` is standard operators only; `ort` takes those of onnxruntime where it is faster with them.
            opset: of the standard operators, 21 to 25; by default the newest that the installed onnxruntime serves.
            external_data: put constants into a file of their own; by default where they take more than 1 GiB.
            accuracy_level: of products with packed weights in profile `ort`: 0 multiplies floats, 4 rounds activations to 8 bits.
            genai: also write what onnxruntime-genai needs to load the directory.
            overwrite: replace files that are there.
            compare: run the file beside the graph; without, no more than a constant stands in memory, and nothing vouches for its numbers.

        Raises:
            ExportError: for a node that ONNX does not express, a file that does not compute what the graph does, or a path that is taken.
            SourceError: without the packages that write ONNX.
        """
        file: OnnxFile = onnx_exporter("export_onnx").export(
            self.graph, path, self.assets, profile=profile, opset=opset, external_data=external_data, accuracy_level=accuracy_level,
            genai=genai, max_context=self.max_context, overwrite=overwrite, compare=compare,
        )  # fmt: skip
        return file

    def report(self) -> Report:
        """Passes, size, bits, error per step, and what was left alone and why: text, which notebooks show as tables."""
        from qcompile.dump.html.notebook import make_report

        sizes = {
            "target": self.contents.target, "weight_bytes": self.weight_bytes, "bits_per_weight": self.bits_per_weight,
            "matmul": self.matmul, "max_batch": self.max_batch, "max_context": self.max_context,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }  # fmt: skip
        return make_report(self.contents, sizes)


def onnx_exporter(name: str) -> ModuleType:
    """The module that writes ONNX, for what is called `name`.

    Raises:
        SourceError: without the packages that it needs.
    """
    try:
        return import_module("qcompile.exporters.onnx")
    except ModuleNotFoundError as error:
        raise SourceError(f"{name}: expected the packages that write ONNX, got no {error.name}; pip install 'qcompile[onnx]'") from error


def lm_inputs(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> dict[str, Tensor]:
    """What a cached graph takes for a plain forward pass: positions count real tokens, padding is -1.

    Raises:
        QCompileError: for tensors that are not integers [B, S] of one shape.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.is_floating_point() or tensor.shape != input_ids.shape:
            raise QCompileError(f"{name}: expected integers [B, S] like input_ids, got {tensor.dtype} {tuple(tensor.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = ((mask != 0).long().cumsum(-1) - 1).masked_fill(mask == 0, -1)
    # The cache starts empty: a token that claims to stand behind others would attend to keys that nobody stored.
    if position_ids is not None and bool((position_ids != positions)[mask != 0].any()):
        raise QCompileError("position_ids: expected 0, 1, 2 … over the real tokens of each row, got others; leave position_ids out")
    return {"input_ids": input_ids.long(), "positions": positions}


def load(
    path: str | os.PathLike[str], *, device: str | None = None, max_batch: int = 1, max_context: int | None = None,
    kv_bytes: int | None = None, page_tokens: int | None = None, share_prefixes: bool = False, allow_native: bool = False,
    engine: str | None = None,
) -> CompiledModel:  # fmt: skip
    """Load an artifact; nothing is unpickled, and weights are mapped and verified as they are read.

    Args:
        path: the directory that `save` wrote.
        device: such as `cuda:0`; by default what the target asks for, if it is here.
        max_batch: sequences served at once.
        max_context: the most tokens of a sequence.
        kv_bytes: size of the cache in bytes, shared by sequences of any lengths.
        page_tokens: tokens of a page of the cache.
        share_prefixes: let prompts that begin alike share what they have in common.
        allow_native: run native code that was not built on this machine; `docs/artifact.md` tells what runs without.
        engine: `reference`, `torch_cpu`, `native`, `cuda` or `onnxruntime` in place of the target's own.

    Raises:
        ArtifactError: for a missing, damaged, foreign or hostile artifact, naming the file.
        EngineError: for an engine that does not exist, or does not serve the target.
    """
    require_known(engine)
    contents = load_artifact(path, allow_native=allow_native)
    if engine == "native" or (engine is None and parse_target(contents.target).arch == "cpu"):
        contents, engine = _for_cpu(contents, asked=engine == "native")
    if engine in (None, "cuda") and parse_target(contents.target).is_cuda:
        contents, engine = _native_or_reference(contents, engine)
    if engine is None and parse_target(contents.target).is_onnx and not has_onnxruntime():
        reason = "the package onnxruntime is not installed; pip install 'qcompile[onnx]'"
        warnings.warn(f"{contents.path}: compiled for {contents.target}, served by reference: {reason}", stacklevel=2)
    return CompiledModel(
        contents, max_batch=max_batch, max_context=max_context, kv_bytes=kv_bytes, page_tokens=page_tokens, share_prefixes=share_prefixes,
        device=device, engine=engine,
    )  # fmt: skip


def _for_cpu(contents: ArtifactContents, *, asked: bool) -> tuple[ArtifactContents, str]:
    """An artifact for CPUs, and its engine: libraries that may run here, or that are built now, or what its maker chose."""
    from qcompile.runtime.engines.native import objection

    made_for = contents.settings.engine
    if not asked and (made_for not in (None, "native") or (made_for == "native" and NATIVE_SOURCE not in contents.binaries)):
        return contents, "torch_cpu" if made_for == "native" else str(made_for)
    reason = objection(contents)
    if not reason:
        return contents, "native"
    from qcompile.rebuild import native_or_torch  # passes and code generation: most processes that only run an artifact go without

    return native_or_torch(contents, reason, asked=asked)


def _native_or_reference(contents: ArtifactContents, engine: str | None) -> tuple[ArtifactContents, str | None]:
    """A GPU artifact without its GPU, or with kernels nobody vouched for, is served by reference, and the caller is told."""
    if engine == "cuda":
        contents.require_native()
        return contents, engine
    reason = None if torch.cuda.is_available() else "there is no CUDA device here"
    if reason is None and not contents.native_allowed:
        reason = f"{len(contents.untrusted)} kernels were not built on this machine (allow_native=True runs them)"
    if reason is None:
        return contents, "cuda"
    warnings.warn(f"{contents.path}: compiled for {contents.target}, served by reference: {reason}", stacklevel=3)
    return contents, "reference"
