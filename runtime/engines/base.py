"""What the CPU engines share: sequences and a plain forward pass, over bound programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import EngineError
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Entry, Plan
from qcompile.ir.memory import plan_entry, with_batch
from qcompile.ir.records import MemoryPlan
from qcompile.runtime.accounting import memory_plan
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layout import CacheLayout, describe, layout_of
from qcompile.runtime.engines.program import Kernels, Program
from qcompile.runtime.kv_cache import KVCache
from qcompile.runtime.sequences import PADDING, SequenceEngine, require_cache

_KEPT = {"prefill": 7, "decode": 8}
"""Entry -> how many programs of it are kept, the last ones used: one for each number of rows and tokens."""


class PlanEngine(SequenceEngine):
    """Runs the entries of a plan on the CPU. Subclasses say how a step runs and in what form it wants constants."""

    name = "plan"

    def __init__(
        self, contents: ArtifactContents, *, max_batch: int = 1, max_context: int = 2048, page_tokens: int | None = None,
        kv_bytes: int | None = None, share_prefixes: bool = False,
    ) -> None:  # fmt: skip
        """Nothing is read yet; `prepare` does that, or the first call.

        Raises:
            CapacityError: if the cache has no room for a page for each row.
        """
        super().__init__()
        self.contents, self.max_batch, self.share_prefixes = contents, max_batch, share_prefixes
        self._entries = _planned_for(contents.plan, max_batch).entries
        self._layout: CacheLayout | None = None
        self.max_context = max_context
        if "decode" in self._entries:
            self._layout = layout_of(
                self._entries["decode"], max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes
            )
            self.max_context = self._layout.capacity
            self.chunk = self._entries["prefill"].limits["sequence"]
        self.vocabulary = vocabulary_of(self._entries["forward"])
        self._constants: dict[str, Tensor] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._programs: dict[tuple[str, int, int], Program] = {}
        self._cache: KVCache | None = None

    def prepare(self) -> None:
        """Read the constants and allocate the cache."""
        if self._constants:
            return
        for name, tensor in self.prepared_constants():
            self._constants[name] = tensor
        if self._layout is not None:
            self._cache = KVCache(self._layout)
            self._arena = torch.empty(max(entry.arena_bytes for entry in self._entries.values()), dtype=torch.uint8)

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Every constant in the form that the steps want, one after the other."""
        return [(name, constant.materialize()) for name, constant in self.contents.constants.items()]

    def kernels(self, cache: KVCache | None) -> Kernels:
        """How steps run over `cache`."""
        raise NotImplementedError

    def program(self, entry: Entry, sizes: Mapping[str, int], states: Mapping[str, Tensor], arena: Tensor, kernels: Kernels) -> Program:
        """An entry bound to sizes, over this engine's constants."""
        return Program(entry, sizes, self._constants, states, arena, kernels)

    @property
    def cache(self) -> KVCache:
        """The cache of all rows."""
        if self._cache is None:
            self.prepare()
        return require_cache(self._cache)

    @property
    def model_constants(self) -> Mapping[str, Constant]:
        """The artifact's."""
        return self.contents.constants

    @property
    def cache_format(self) -> str:
        """As the plan has it."""
        return describe(self._entries["decode"])

    @property
    def memory(self) -> MemoryPlan:
        """Bytes that are allocated, by purpose; prepares the engine."""
        self.prepare()
        return memory_plan(self.weight_bytes, self._layout, self._arena.numel())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the constants in the forms that the steps want."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._constants.values())

    def compute(self, name: str, rows: Sequence[int], ids: Tensor, positions: Tensor) -> Tensor:
        """Through the program for that many rows and tokens."""
        program = self._program(name, *ids.shape)
        program.tensors["input_ids"].copy_(ids)
        program.tensors["positions"].copy_(positions)
        self.cache.bind(rows)
        program.run()
        return program.tensors[self._entries[name].outputs[0]][:, -1].clone()

    def _run_tokens(self, name: str, parts: Mapping[int, Sequence[int]], out: Tensor | None) -> Tensor:
        """A decode step writes its tokens where the program reads them, without a tensor in between."""
        if name != "decode":
            return super()._run_tokens(name, parts, out)
        cache, program = self.cache, self._program(name, len(parts), 1)
        ids, positions, logits = program.step
        for place, (row, part) in enumerate(parts.items()):
            ids[place], positions[place] = (part[0], cache.lengths[row]) if part else (0, PADDING)
        cache.bind(list(parts))
        program.run()
        return logits.clone() if out is None else out.copy_(logits)

    def _program(self, name: str, batch: int, sequence: int) -> Program:
        key = (name, batch, sequence)
        program = self._programs.pop(key, None)
        if program is None:
            kept = [old for old in self._programs if old[0] == name]
            if len(kept) >= _KEPT[name]:
                del self._programs[kept[0]]
            cache = self.cache
            sizes = {"batch": batch, "sequence": sequence, **cache.sizes}
            program = self.program(self._entries[name], sizes, cache.inputs(batch), self._arena, self.kernels(cache))
        self._programs[key] = program
        return program

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The `forward` entry on inputs by name; a model with a cache is given an empty one."""
        self.prepare()
        entry = self._entries["forward"]
        sizes = sizes_of(entry, inputs)
        given = dict(inputs)
        cache = None
        if "input_ids" in given:
            require_vocabulary("forward", given["input_ids"], self.vocabulary)
        if "page_table" in entry.inputs:
            batch, length = sizes["batch"], sizes["sequence"]
            given.setdefault("positions", torch.arange(length).repeat(batch, 1))
            tokens = [int(count) for count in given["positions"].amax(dim=1) + 1]
            cache = KVCache(layout_of(entry, max_batch=batch, max_context=max(1, *tokens)))
            cache.reserve(tokens, range(batch))
            cache.bind(range(batch))
            sizes |= cache.sizes
        planned = plan_entry(entry, {name: value for name, value in sizes.items() if name not in _CACHE_SIZES})
        arena = torch.empty(planned.arena_bytes, dtype=torch.uint8)
        shared = cache.inputs(sizes["batch"]) if cache else {}
        program = self.program(planned, sizes, shared, arena, self.kernels(cache))
        for name in entry.inputs:
            if name in given and name not in shared:
                program.tensors[name].copy_(given[name])
        program.run()
        return [program.tensors[name].clone() for name in entry.outputs]


def _planned_for(plan: Plan, max_batch: int) -> Plan:
    """The plan, laid out anew if its arena is too small for `max_batch` sequences."""
    enough = all(entry.limits.get("batch", max_batch) >= max_batch for entry in plan.entries.values())
    return plan if enough else with_batch(plan, max_batch)


def require_vocabulary(name: str, ids: Tensor, vocabulary: int) -> None:
    """Refuse tokens that a model of so many does not know.

    Raises:
        EngineError: naming the first, or for no tokens at all.
    """
    if not ids.numel():
        raise EngineError(f"{name}: input_ids: expected at least one token, got shape {list(ids.shape)}")
    least, greatest = int(ids.min()), int(ids.max())
    if least < 0 or greatest >= vocabulary:
        raise EngineError(f"{name}: input_ids: expected tokens of 0 to {vocabulary - 1}, got {least if least < 0 else greatest}")


def vocabulary_of(entry: Entry) -> int:
    """How many tokens the model knows: the rows of the tables that `input_ids` index."""
    rows = [
        entry.buffers[step.args[table]["buffer"]].shape[0]
        for step in entry.steps
        for table, indices in _TABLES.get(step.operator, ())
        if step.args[indices] == {"buffer": "input_ids"}
    ]
    return min((count for count in rows if isinstance(count, int)), default=1 << 62)


_TABLES = {"aten.embedding.default": ((0, 1),), "qcompile.quantized_embedding.default": ((1, 0),)}
"""Operators that look rows up -> where they take the table and the indices."""
_CACHE_SIZES = ("pages", "pages_per_sequence", "page_tokens", "sequences")


def sizes_of(entry: Entry, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """What the symbols in the inputs' shapes stand for.

    Raises:
        EngineError: for an input that is missing or has another number of dimensions.
    """
    sizes: dict[str, int] = {}
    for name in entry.inputs:
        buffer = entry.buffers[name]
        if buffer.kind != "input" or (name not in inputs and name in ("positions", "page_table", "slots")):
            continue
        if name not in inputs or inputs[name].dim() != len(buffer.shape):
            got = f"{inputs[name].dim()} dimensions" if name in inputs else "none"
            raise EngineError(f"{name}: expected a tensor of {len(buffer.shape)} dimensions, got {got}")
        sizes |= {symbol: length for symbol, length in zip(buffer.shape, inputs[name].shape, strict=True) if isinstance(symbol, str)}
    return sizes
