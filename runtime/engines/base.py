"""What the CPU engines share: prompts in chunks, tokens one by one, a plain forward pass, over bound programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import CapacityError, EngineError
from qcompile.ir.lowered import Entry, Plan
from qcompile.ir.memory import plan_entry, with_batch
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.program import Kernels, Program
from qcompile.runtime.kv_cache import KVCache, state_buffers

PADDING = -1
"""The position of a token that is not stored and attends to nothing."""
_KEPT_PROGRAMS = 8


class PlanEngine:
    """Runs the entries of a plan on the CPU. Subclasses say how a step runs and in what form it wants constants."""

    name = "plan"

    def __init__(self, contents: ArtifactContents, *, max_batch: int = 1, max_context: int = 2048) -> None:
        """Nothing is read yet; `prepare` does that, or the first call."""
        self.contents, self.max_batch, self.max_context = contents, max_batch, max_context
        self.state: list[int] = []
        self._entries = _planned_for(contents.plan, max_batch).entries
        self._vocabulary = _vocabulary(self._entries["forward"])
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
        if "decode" in self._entries:
            self._cache = self.new_cache(self._entries["decode"], self.max_batch, self.max_context)
            self._arena = self._grown(max(entry.arena_bytes for entry in self._entries.values()))

    def prepared_constants(self) -> Sequence[tuple[str, Tensor]]:
        """Every constant in the form that the steps want, one after the other."""
        return [(name, constant.materialize()) for name, constant in self.contents.constants.items()]

    def kernels(self, cache: KVCache | None) -> Kernels:
        """How steps run over `cache`."""
        raise NotImplementedError

    @staticmethod
    def new_cache(entry: Entry, batch: int, tokens: int) -> KVCache:
        """A cache of one page per sequence."""
        return KVCache(state_buffers(entry), max_batch=batch, max_context=tokens)

    @property
    def cache(self) -> KVCache:
        """The cache of `prefill` and `decode`."""
        self.prepare()
        if self._cache is None:
            raise EngineError("this model has no cache: expected a causal language model for prefill and decode; call forward")
        return self._cache

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a batch of sequences over: prompts in chunks, the logits [B, V] after each one's last token.

        Raises:
            CapacityError: for more sequences or tokens than there is room for, before anything is computed.
            EngineError: for a sequence without tokens or a token that the model does not know.
        """
        cache, rows = self.cache, list(range(len(prompts)))
        if not all(map(len, prompts)) or not prompts:
            raise EngineError(f"prefill: expected at least one token in each sequence, got {[len(prompt) for prompt in prompts]}")
        if len(prompts) > self.max_batch:
            raise CapacityError(
                f"prefill: expected at most {self.max_batch} sequences, got {len(prompts)}; load with max_batch={len(prompts)}"
            )
        self._require_tokens("prefill", prompts)
        cache.reset()
        self.state = []
        cache.require([len(prompt) for prompt in prompts], rows)
        chunk = self._entries["prefill"].limits["sequence"]
        last: dict[int, Tensor] = {}
        for start in range(0, max(map(len, prompts)), chunk):
            parts = [list(prompt[start : start + chunk]) for prompt in prompts]
            logits = self._step("prefill", parts)
            for row, prompt in enumerate(prompts):
                if start < len(prompt) <= start + chunk:
                    last[row] = logits[row].clone()
        self.state = list(cache.lengths[: len(prompts)])
        return torch.stack([last[row] for row in rows])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each sequence, -1 for one that takes no part; the logits [B, V] after it.

        Raises:
            CapacityError: when a sequence has filled its part of the cache.
        """
        if not tokens or len(tokens) != len(self.state):
            raise EngineError(
                f"decode: expected a token for each of the {len(self.state)} sequences of the last prefill, got {len(tokens)}"
            )
        parts = [[token] if token >= 0 else [] for token in tokens]
        self._require_tokens("decode", parts)
        logits = self._step("decode", parts)
        self.state = list(self.cache.lengths[: len(tokens)])
        return logits.clone()

    def _require_tokens(self, name: str, parts: Sequence[Sequence[int]]) -> None:
        vocabulary = self._vocabulary
        for row, part in enumerate(parts):
            wrong = [token for token in part if not 0 <= token < vocabulary]
            if wrong:
                raise EngineError(f"{name}: sequence {row}: expected tokens of 0 to {vocabulary - 1}, got {wrong[0]}")

    def _step(self, name: str, parts: Sequence[Sequence[int]]) -> Tensor:
        """Run the next tokens of every row through an entry; the last logits [B, V], valid until the next step."""
        cache, rows = self.cache, range(len(parts))
        counts = [len(part) for part in parts]
        cache.reserve(counts, rows)
        width = max(1, *counts)
        program = self._program(name, len(parts), width)
        ids = [[*part, *[0] * (width - len(part))] for part in parts]
        places = [[*range(cache.lengths[row], cache.lengths[row] + counts[row]), *[PADDING] * (width - counts[row])] for row in rows]
        program.tensors["input_ids"].copy_(torch.tensor(ids))
        program.tensors["positions"].copy_(torch.tensor(places))
        program.tensors["page_table"].copy_(torch.tensor(cache.table(rows), dtype=torch.int32))
        if "slots" in program.tensors:
            program.tensors["slots"].copy_(torch.arange(len(parts)))
        program.run()
        cache.advance(counts, rows)
        return program.tensors[self._entries[name].outputs[0]][:, -1]

    def _program(self, name: str, batch: int, sequence: int) -> Program:
        key = (name, batch, sequence)
        if key not in self._programs:
            if len(self._programs) >= _KEPT_PROGRAMS:
                self._programs.pop(next(old for old in self._programs if old[0] != "decode" or old[1] != batch))
            cache = self.cache
            sizes = {"batch": batch, "sequence": sequence, **cache.sizes}
            self._programs[key] = Program(self._entries[name], sizes, self._constants, cache.tensors, self._arena, self.kernels(cache))
        return self._programs[key]

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The `forward` entry on inputs by name; a model with a cache is given an empty one."""
        self.prepare()
        entry = self._entries["forward"]
        sizes = sizes_of(entry, inputs)
        given = dict(inputs)
        cache = None
        if "input_ids" in given:
            _require_vocabulary("forward", given["input_ids"], self._vocabulary)
        if "page_table" in entry.inputs:
            batch, length = sizes["batch"], sizes["sequence"]
            given.setdefault("positions", torch.arange(length).repeat(batch, 1))
            tokens = [int(count) for count in given["positions"].amax(dim=1) + 1]
            cache = self.new_cache(entry, batch, max(1, *tokens))
            cache.reserve(tokens, range(batch))
            given["page_table"] = torch.tensor(cache.table(range(batch)), dtype=torch.int32)
            given["slots"] = torch.arange(batch, dtype=torch.int32)
            sizes |= cache.sizes
        planned = plan_entry(entry, {name: value for name, value in sizes.items() if name not in _CACHE_SIZES})
        arena = torch.empty(planned.arena_bytes, dtype=torch.uint8)
        program = Program(planned, sizes, self._constants, cache.tensors if cache else {}, arena, self.kernels(cache))
        for name in entry.inputs:
            if name in given:
                program.tensors[name].copy_(given[name])
        program.run()
        return [program.tensors[name].clone() for name in entry.outputs]

    def _grown(self, size: int) -> Tensor:
        return self._arena if self._arena.numel() >= size else torch.empty(size, dtype=torch.uint8)


def _planned_for(plan: Plan, max_batch: int) -> Plan:
    """The plan, laid out anew if its arena is too small for `max_batch` sequences."""
    enough = all(entry.limits.get("batch", max_batch) >= max_batch for entry in plan.entries.values())
    return plan if enough else with_batch(plan, max_batch)


def _require_vocabulary(name: str, ids: Tensor, vocabulary: int) -> None:
    if not ids.numel():
        raise EngineError(f"{name}: input_ids: expected at least one token, got shape {list(ids.shape)}")
    least, greatest = int(ids.min()), int(ids.max())
    if least < 0 or greatest >= vocabulary:
        raise EngineError(f"{name}: input_ids: expected tokens of 0 to {vocabulary - 1}, got {least if least < 0 else greatest}")


def _vocabulary(entry: Entry) -> int:
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
