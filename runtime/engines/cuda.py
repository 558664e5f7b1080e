"""The CUDA engine: an artifact's cubins on an NVIDIA GPU, decode as one CUDA graph per batch bucket, prefill in chunks of one size."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Entry, Kernel, Plan
from qcompile.ir.records import MemoryPlan
from qcompile.runtime.accounting import memory_plan
from qcompile.runtime.cache_layout import describe, layout_of, state_buffers
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.graph import CapturedProgram, CaptureError, Queue
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.program import Arena, Constants, Context, Program
from qcompile.runtime.kv_cache import KVCache
from qcompile.runtime.sequences import PADDING, SequenceEngine

Runnable = Program | CapturedProgram


class Contents(Protocol):
    """What the engine takes from an artifact (`qcompile.runtime.artifact.ArtifactContents`)."""

    @property
    def plan(self) -> Plan:
        """Entry points."""

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """Kernel name -> its launches."""

    @property
    def binaries(self) -> Mapping[str, bytes]:
        """File name -> cubin."""

    @property
    def constants(self) -> Mapping[str, Constant]:
        """Weights by name, read when asked for."""

    @property
    def target(self) -> str:
        """`ARCH-SCHEME[-KV]`."""

    def require_native(self) -> None:
        """Raise unless the binaries are trusted."""


class CudaEngine(SequenceEngine):
    """Runs a plan on one GPU; rows that fill a bucket are padding."""

    name = "cuda"

    def __init__(
        self, contents: Contents, *, max_batch: int = 1, max_context: int = 2048, page_tokens: int | None = None,
        kv_bytes: int | None = None, share_prefixes: bool = False, device: str = "cuda", driver: Driver | None = None,
    ) -> None:  # fmt: skip
        """Take an artifact's plan and binaries and allocate the cache; kernels and weights wait for `prepare`.

        `device` is where tensors live, `driver` what launches over them: a test gives "cpu" and a stub.

        Raises:
            CapacityError: if the cache has no room for a page for each row.
            UntrustedCodeError: for binaries that were not built on this machine and that the caller did not allow.
            EngineError: if there is no driver, or the device cannot run binaries of the target's architecture.
        """
        super().__init__()
        contents.require_native()
        self.device = torch.device(device)
        self.driver = driver or Driver(device=self.device.index or 0)
        require_architecture(contents.target.split("-")[0], self.driver.architecture)
        self.contents, self.plan, self.max_batch, self.share_prefixes = contents, contents.plan, max_batch, share_prefixes
        decode = self.plan.entries.get("decode")
        layout = layout_of(decode, max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes)
        self._cache = KVCache(layout, self.device)
        self.max_context = layout.capacity
        if "prefill" in self.plan.entries:
            self.chunk = self.plan.entries["prefill"].limits["sequence"]
        self.queue = Queue(self.driver, self.device)
        self._modules = Modules(self.driver, contents.kernels, contents.binaries)
        self._context = Context(
            self.driver,
            self.device,
            self.queue.handle,
            self._modules,
            Constants(lambda name: contents.constants[name].materialize(), self.device),
            Arena(self.device),
            Arena(self.device),
        )
        self._prefill: dict[int, Program] = {}
        self._decode: dict[int, Runnable] = {}
        self._graphs = True

    def prepare(self) -> None:
        """Load the kernels, upload the constants and capture decode for every batch bucket."""
        if "decode" not in self.plan.entries or self._decode:
            return
        # The largest program first: the others find the arena large enough and share it.
        self._prefill_program(self.max_batch)
        for bucket in reversed(batch_buckets(self.max_batch)):
            self._decode[bucket] = self._captured(self._bind("decode", bucket, 1))

    @property
    def cache(self) -> KVCache:
        """The cache of all rows, on the device."""
        self.prepare()
        return self._cache

    @property
    def model_constants(self) -> Mapping[str, Constant]:
        """The artifact's."""
        return self.contents.constants

    @property
    def cache_format(self) -> str:
        """As the plan has it."""
        return describe(self.plan.entries["decode"])

    @property
    def memory(self) -> MemoryPlan:
        """Bytes that are allocated on the device, by purpose; prepares the engine."""
        self.prepare()
        arena = self._context.arena.nbytes + self._context.workspace.nbytes
        return memory_plan(self._context.constants.nbytes, self._cache.layout, arena)

    def working(self) -> contextlib.AbstractContextManager[object]:
        """On the engine's stream."""
        return self.queue()

    def decode(self, tokens: Sequence[int] | Tensor, *, out: Tensor | None = None) -> Tensor:
        """As `SequenceEngine.decode`; a tensor on the device is not read by the host, so it must hold no negative token."""
        if not isinstance(tokens, Tensor) or not tokens.is_cuda:
            return super().decode(tokens, out=out)
        rows = self.rows
        if len(tokens) != len(rows):
            raise EngineError(f"decode: expected a token for each of the {len(rows)} sequences of the batch, got {len(tokens)}")
        positions = torch.tensor([[length] for length in self.state])
        logits = self._advance("decode", rows, [1] * len(rows), tokens.view(-1, 1).long(), positions)
        self._histories |= dict.fromkeys(rows)
        return logits if out is None else out.copy_(logits)

    def compute(self, name: str, rows: Sequence[int], ids: Tensor, positions: Tensor) -> Tensor:
        """Through the program for the least bucket that holds so many rows; decoding as one graph."""
        runnable = self._prefill_program(len(rows)) if name == "prefill" else self._decode[bucket_of(len(rows), self.max_batch)]
        program = runnable.program if isinstance(runnable, CapturedProgram) else runnable
        self._write(program, rows, ids, positions)
        runnable.run()
        return program.outputs[0][: len(rows), -1].clone()

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The `forward` entry on inputs by name; a model with a cache is given an empty one, `positions` and `page_table` by default.

        Raises:
            EngineError: for an input that is missing or has another shape than the model was traced with.
        """
        entry = self.plan.entries["forward"]
        states = state_buffers(entry)
        given = {**_own_inputs(inputs), **inputs} if states else inputs
        sizes = sizes_of(entry, given)
        with self.queue():
            batch, length = sizes.get("batch", 1), sizes.get("sequence", 1)
            cache = KVCache(layout_of(entry, max_batch=batch, max_context=length), self.device)
            program = Program(self._context, entry, {**sizes, **cache.sizes} if states else sizes, cache.tensors)
            for name, place in program.inputs.items():
                place.copy_(given[name])
            program.run()
            return [output.clone() for output in program.outputs]

    def program(self, batch: int) -> Program:
        """The decode program that serves a batch of that size."""
        self.prepare()
        runnable = self._decode[bucket_of(batch, self.max_batch)]
        return runnable.program if isinstance(runnable, CapturedProgram) else runnable

    def replay(self, batch: int) -> None:
        """Run decode for a batch of that size once more on what its inputs hold: what a benchmark times."""
        with self.queue():
            self._decode[bucket_of(batch, self.max_batch)].run()

    @property
    def captured_buckets(self) -> list[int]:
        """Batch buckets whose decode is a CUDA graph."""
        return sorted(bucket for bucket, runnable in self._decode.items() if isinstance(runnable, CapturedProgram))

    def close(self) -> None:
        """Wait for the device and give everything back; the engine cannot be used afterwards."""
        self.queue.close()
        for runnable in self._decode.values():
            if isinstance(runnable, CapturedProgram):
                runnable.close()
        self._decode.clear()
        self._prefill.clear()
        self._modules.close()
        self.driver.release()

    def _bind(self, name: str, batch: int, sequence: int) -> Program:
        sizes = {"batch": batch, "sequence": sequence, **self._cache.sizes}
        with self.queue():
            program = Program(self._context, self.plan.entries[name], sizes, self._cache.inputs(batch))
            self._write(program, [], torch.zeros(0, 1, dtype=torch.int64, device="cpu"), torch.zeros(0, 1, device="cpu"))
        return program

    def _prefill_program(self, count: int) -> Program:
        bucket = bucket_of(count, self.max_batch)
        if bucket not in self._prefill:
            self._prefill[bucket] = self._bind("prefill", bucket, self.plan.entries["prefill"].limits["sequence"])
        return self._prefill[bucket]

    def _captured(self, program: Program) -> Runnable:
        if not self._graphs:
            return program
        try:
            return CapturedProgram(program, self.queue)
        except CaptureError as error:
            self._graphs = False
            more = f" and {len(program.obstacles) - 1} more" if len(program.obstacles) > 1 else ""
            warnings.warn(f"the CUDA graph is off and decode runs step by step: {error}{more}", RuntimeWarning, stacklevel=3)
            return program

    def _write(self, program: Program, rows: Sequence[int], ids: Tensor, positions: Tensor) -> None:
        """Put tokens and positions [n, S] of rows where the program reads them; what is beyond them is padding."""
        count, width = ids.shape
        for name, given, beyond in (("input_ids", ids, 0), ("positions", positions, PADDING)):
            place = program.inputs[name]
            if place.shape != given.shape:
                place.fill_(beyond)
            place[:count, :width].copy_(given)
        self._cache.bind(rows, program.sizes["batch"])


def require_architecture(arch: str, device: str) -> None:
    """Whether a device can run binaries of an architecture: those of sm80 also on later 8.x, all others on their own only.

    Raises:
        EngineError: if it cannot.
    """
    if arch == device or (arch == "sm80" and device in ("sm86", "sm87", "sm89")):
        return
    raise EngineError(f"device: expected one that runs {arch}, got {device}; compile with target={device}-…, or load for the reference")


def batch_buckets(max_batch: int) -> list[int]:
    """The batch sizes that decode is captured for: powers of two below `max_batch`, and itself."""
    return [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch] + [max_batch]


def bucket_of(count: int, max_batch: int) -> int:
    """The least bucket that holds `count` sequences."""
    return next(bucket for bucket in batch_buckets(max_batch) if bucket >= count)


def _own_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions from 0 on, and one page for each sequence, for `input_ids` [B, S]."""
    if "input_ids" not in inputs or inputs["input_ids"].dim() != 2:
        return {}
    batch, sequence = inputs["input_ids"].shape
    return {
        "positions": torch.arange(sequence).expand(batch, sequence),
        "page_table": torch.arange(batch, dtype=torch.int32).view(batch, 1),
        "slots": torch.arange(batch, dtype=torch.int32),
    }


def sizes_of(entry: Entry, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The value of every name in the shapes of the inputs that are given.

    Raises:
        EngineError: for a missing input, a wrong shape, or two inputs that disagree.
    """
    sizes: dict[str, int] = {}
    for name in entry.inputs:
        buffer = entry.buffers[name]
        if buffer.kind != "input":
            continue
        if name not in inputs:
            raise EngineError(f"forward: expected the inputs {', '.join(entry.inputs)}, got none called {name}")
        shape = tuple(inputs[name].shape)
        if len(shape) != len(buffer.shape):
            raise EngineError(f"forward: {name}: expected {len(buffer.shape)} axes, got shape {shape}")
        for axis, (expected, got) in enumerate(zip(buffer.shape, shape, strict=True)):
            known = sizes.setdefault(expected, got) if isinstance(expected, str) else expected
            if isinstance(known, int) and known != got:
                raise EngineError(f"forward: {name}: expected {known} along axis {axis} ({expected}), got {got}")
    return sizes
