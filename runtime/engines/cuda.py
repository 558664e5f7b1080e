"""The CUDA engine: an artifact's cubins on an NVIDIA GPU, decode as one CUDA graph per batch bucket, prefill in chunks of one size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Entry, Kernel, Plan
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.graph import CapturedProgram, CaptureError, Queue
from qcompile.runtime.cuda.modules import Modules
from qcompile.runtime.cuda.program import Arena, Constants, Context, Program
from qcompile.runtime.kv_cache import KVCache, state_buffers

Runnable = Program | CapturedProgram
PADDING = -1
"""The position of a token that is not there: it is not stored and attends to nothing."""


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


class CudaEngine:
    """Runs a plan on one GPU. `state` is the number of tokens that each sequence of the batch has in the cache."""

    name = "cuda"

    def __init__(
        self, contents: Contents, *, max_batch: int = 1, max_context: int = 2048, kv_bytes: int | None = None,
        device: str = "cuda", driver: Driver | None = None,
    ) -> None:  # fmt: skip
        """Take an artifact's plan and binaries and allocate the cache; kernels and weights wait for `prepare`.

        `device` is where tensors live, `driver` what launches over them: a test gives "cpu" and a stub.

        Raises:
            CapacityError: if the cache has no room for a single token per row.
            UntrustedCodeError: for binaries that were not built on this machine and that the caller did not allow.
            EngineError: if there is no driver, or the device cannot run binaries of the target's architecture.
        """
        contents.require_native()
        self.device = torch.device(device)
        self.driver = driver or Driver(device=self.device.index or 0)
        require_architecture(contents.target.split("-")[0], self.driver.architecture)
        self.plan, self.max_batch = contents.plan, max_batch
        states = state_buffers(self.plan.entries["decode"]) if "decode" in self.plan.entries else []
        self.cache = KVCache(states, max_batch=max_batch, max_context=max_context, kv_bytes=kv_bytes, device=self.device)
        self.max_context = self.cache.capacity
        self.state: list[int] = []
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
        self._tables: dict[Program, list[list[int]]] = {}
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

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a batch of sequences over: their tokens go through in chunks, and each one's last logits come back [B, V].

        Raises:
            CapacityError: for more sequences or tokens than the cache was made for.
            EngineError: for a prompt without tokens.
        """
        self.prepare()
        rows, counts = range(len(prompts)), [len(prompt) for prompt in prompts]
        if 0 in counts or not counts:
            raise EngineError(f"prefill: sequence {counts.index(0) if counts else 0}: expected at least one token, got none")
        self.state = []
        self.cache.reset()
        self.cache.reserve(counts, rows)
        program = self._prefill_program(len(prompts))
        chunk = self.plan.entries["prefill"].limits["sequence"]
        found: dict[int, Tensor] = {}
        with self.queue():
            for start in range(0, max(counts), chunk):
                self._write(program, *chunk_of(prompts, start, chunk, program.sizes["batch"]))
                program.run()
                for row, count in enumerate(counts):
                    if start < count <= start + chunk:
                        found[row] = program.outputs[0][row, -1].clone()
            logits = torch.stack([found[row] for row in rows])
        self.cache.advance(counts, rows)
        self.state = counts
        return logits

    def decode(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """One more token [B] for each sequence; the logits [B, V] after it.

        A negative token says that its sequence takes no part: nothing is stored for it and its logits mean nothing. A tensor on the
        device is not read by the host, so it must hold no negative token.

        Raises:
            CapacityError: when a sequence has filled its part of the cache.
            EngineError: for another number of tokens than there are sequences.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).view(-1, 1)
        count = len(ids)
        if count != len(self.state):
            raise EngineError(f"decode: expected one token for each of the {len(self.state)} sequences of the last prefill, got {count}")
        rows = [row for row in range(count) if ids.is_cuda or ids[row] >= 0]
        self.cache.reserve([1] * len(rows), rows)
        program = self.program(count)
        bucket = program.sizes["batch"]
        positions = torch.full((bucket, 1), PADDING)
        positions[rows, 0] = torch.tensor([self.state[row] for row in rows], dtype=torch.int64)
        padded = torch.cat((ids.clamp(min=0), ids.new_zeros(bucket - count, 1)))
        with self.queue():
            self._write(program, padded, positions)
            self._decode[bucket].run()
            logits = program.outputs[0][:count, -1].clone()
        self.cache.advance([1] * len(rows), rows)
        self.state = self.cache.lengths[:count]
        return logits

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
            cache = KVCache(states, max_batch=sizes.get("batch", 1), max_context=sizes.get("sequence", 1), device=self.device)
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
        sizes = {"batch": batch, "sequence": sequence, **self.cache.sizes}
        with self.queue():
            program = Program(self._context, self.plan.entries[name], sizes, self.cache.tensors)
            self._write(program, torch.zeros(batch, sequence, dtype=torch.int64), torch.full((batch, sequence), PADDING))
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

    def _write(self, program: Program, ids: Tensor, positions: Tensor) -> None:
        program.inputs["input_ids"].copy_(ids)
        program.inputs["positions"].copy_(positions)
        if "slots" in program.inputs:
            program.inputs["slots"].copy_(torch.arange(program.sizes["batch"]))
        table = self.cache.table(range(program.sizes["batch"]))
        if self._tables.get(program) != table:
            program.inputs["page_table"].copy_(torch.tensor(table, dtype=torch.int32))
            self._tables[program] = table


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


def chunk_of(prompts: Sequence[Sequence[int]], start: int, chunk: int, batch: int) -> tuple[Tensor, Tensor]:
    """Token ids and positions [batch, chunk] from `start` on; what lies beyond a prompt, and rows beyond the last one, is padding."""
    ids = torch.zeros(batch, chunk, dtype=torch.int64, device="cpu")
    positions = torch.full((batch, chunk), PADDING, device="cpu")
    for row, prompt in enumerate(prompts):
        part = torch.tensor(prompt[start : start + chunk], dtype=torch.int64, device="cpu")
        ids[row, : len(part)] = part
        positions[row, : len(part)] = torch.arange(start, start + len(part), device="cpu")
    return ids, positions


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
