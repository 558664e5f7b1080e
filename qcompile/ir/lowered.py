"""What passes, code generators and the runtime share: kernel specifications, kernels, plans and the protocols between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qcompile.ir.size import Size

if TYPE_CHECKING:
    from qcompile.ir.graph import Graph
    from qcompile.ir.records import MemoryPlan, PassRecord

BUCKETS: dict[str, tuple[int, int]] = {"m1": (1, 1), "m2-63": (2, 63), "m64": (64, 1 << 30)}
"""Rows of the activation (batch · sequence) that a kernel is made for: name -> (least, most), both inclusive."""


@dataclass(frozen=True)
class KernelSpec:
    """One operator as a backend must emit it. Hashable: equal specifications share one kernel.

    Attributes:
        operator: the operator's name without namespace, such as `quantized_linear`, `cache_attend`, `linear`.
        sizes: the static sizes it is specialised for, such as (("N", 1536), ("K", 576)), sorted by name.
        formats: operand -> storage, such as (("codes", "int4 g64 sym fp16"), ("x", "bf16")), sorted by name.
        options: static attributes such as (("eps", 1e-5), ("window", 0)), sorted by name.
        bucket: a key of `BUCKETS`, or "" for a kernel that serves every number of rows.
    """

    operator: str
    sizes: tuple[tuple[str, int], ...]
    formats: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...] = ()
    bucket: str = ""

    def size(self, name: str) -> int:
        """The static size called `name`."""
        return dict(self.sizes)[name]

    def format(self, operand: str) -> str | None:
        """How `operand` is stored; None where the operator has no such operand here (no bias, no zero points)."""
        return dict(self.formats).get(operand)

    def option(self, name: str, default: Any = None) -> Any:
        """The static attribute called `name`."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class Parameter:
    """One run-time argument of a launched function, in order.

    Attributes:
        name: as in the source.
        kind: "pointer" (value names an operand, a result or a workspace) or "i32" (value is a size expression).
        value: an operand name (`x`, `codes`, `out`, `out1` …, `k_tables_0` of a list, a workspace's name) or a size expression.
        dtype: Triton's type of a pointer's elements (`bf16`, `fp16`, `fp32`, `u8`, `i32`, `i64`), or `i32`.
        divisible_by: what the binary assumes of the address in bytes, or of the integer; 1 assumes nothing.
    """

    name: str
    kind: str
    value: Size
    dtype: str
    divisible_by: int = 1


@dataclass(frozen=True)
class Launch:
    """One launch of one function: its grid over size expressions, arguments, and what was built for it.

    Names in expressions: `batch`, `sequence`, `rows` (batch · sequence), `pages` (pages per sequence), `page_tokens`.
    """

    function: str
    grid: tuple[Size, Size, Size]
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    binary: str = ""
    symbol: str = ""
    registers: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of a kernel: bytes as a size expression, not initialised unless `zeroed`."""

    name: str
    bytes: Size
    zeroed: bool = False


@dataclass(frozen=True)
class Kernel:
    """A complete source file with its launches; `layouts` names operands stored otherwise than the artifact stores them.

    Attributes:
        name: a file name without suffix, unique for the specification and target.
        spec: what it implements.
        source: the whole file.
        launches: in order; later ones may read what earlier ones wrote into a workspace.
        workspaces: scratch buffers.
        layouts: operand -> name of a layout in `qcompile.ir.layouts`, applied once at load.
        expects: instruction classes the binary must contain (`wgmma`, `mma`, `cp.async`, `load128`).
        suffix: of its source file: `.py`, or `.cpp` for a kernel whose launch is a call of a function of the artifact's library.
    """

    name: str
    spec: KernelSpec
    source: str
    launches: tuple[Launch, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    expects: tuple[str, ...] = ()
    suffix: str = ".py"


@dataclass(frozen=True)
class Buffer:
    """A tensor of the plan: dtype name, shape over size expressions, and where it lives.

    kind: "input", "constant", "state", "intermediate" or "output"; `offset` is the byte offset in the arena of an
    intermediate, planned at the entry's maximum (-1: allocated per call); `alias` names the buffer whose memory this one
    shares as a view; `order` lists the axes from slowest to fastest in memory where that is not their own order.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    kind: str
    offset: int = -1
    alias: str = ""
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """One operator call of a plan.

    Attributes:
        operator: its name in `qcompile.ir.allowed`.
        args: JSON values; {"buffer": name}, {"size": expression}, {"dtype": "fp32"} and {"float": "-inf"} stand for what JSON cannot say.
        kwargs: the same by name.
        outputs: the buffers its results go to; empty for an operator that writes in place.
        kernels: row bucket -> kernel name; empty where the operator runs as its reference.
        node: the graph node it came from.
    """

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    kernels: dict[str, str] = field(default_factory=dict)
    node: str = ""


@dataclass(frozen=True)
class Entry:
    """An entry point: inputs and outputs by buffer name (leaves of the graph's interface in order), steps in order.

    `limits` are the greatest sizes the arena of `arena_bytes` is planned for; empty where buffers are allocated per call.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    limits: dict[str, int]
    arena_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """The entry points of an artifact: `forward` always; `step` (prefill and decode over the cache) where there is one."""

    entries: dict[str, Entry]
    kernels: tuple[str, ...] = ()


def item_operand(argument: str, place: int) -> str:
    """The operand that an item of a list of tensors is to kernels and engines: `k_tables_0`."""
    return f"{argument}_{place}"


class Backend(Protocol):
    """Turns specifications into kernels, or says why not."""

    @property
    def name(self) -> str:
        """What coverage tables call it."""

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why `spec` cannot be served, or None if it can."""

    def emit(self, spec: KernelSpec) -> Kernel:
        """The kernel for a specification that is not refused."""


class Instrument(Protocol):
    """Watches a pipeline: one hook before and one after each pass."""

    def before(self, name: str, graph: Graph) -> None:
        """Called before the pass called `name`."""

    def after(self, record: PassRecord, graph: Graph) -> None:
        """Called after it, with what the manager recorded."""


class Stored(Protocol):
    """A sequence out of its engine's cache."""

    @property
    def length(self) -> int:
        """Tokens that were stored."""


class Engine(Protocol):
    """Executes a plan. Sampling and `generate` know nothing else of what runs a model.

    At most `max_batch` sequences, each of at most `max_context` tokens, share its cache. `rows` are those that are taken, `state` the
    tokens stored for each of them. An operation for which there is no room is an error before anything is changed.
    """

    name: str
    max_batch: int
    max_context: int

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that are taken, in order."""

    @property
    def state(self) -> list[int]:
        """The tokens stored for each of `rows`."""

    @property
    def memory(self) -> MemoryPlan:
        """Bytes that are allocated, by purpose."""

    def prepare(self) -> None:
        """Load kernels, constants and cache; the first call of the others does it where this was not called."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a batch of sequences over; the logits [B, V] after each one's last token."""

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each of `rows`; the logits [B, V] after it. A token of -1 stores nothing, its logits mean nothing."""

    def join(self, prompt: Sequence[int]) -> tuple[int, Tensor]:
        """Read a prompt into a free row: the row, and the logits [V] after its last token."""

    def join_all(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts into free rows at once: the rows, and the logits [n, V]."""

    def leave(self, row: int) -> None:
        """Free a row and its pages."""

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """One more token for some rows: the logits [n, V] after it, in the order of `tokens`."""

    def fork(self, row: int) -> int:
        """A new row that goes on from where `row` is, and shares its pages."""

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of so many tokens could join now and all rows still take a step."""

    def suspend(self, row: int) -> Stored:
        """Take a sequence out of the cache into memory of the host."""

    def resume(self, saved: Any) -> int:
        """Put what `suspend` took out back: its row."""

    def save(self, row: int, path: str | os.PathLike[str]) -> None:
        """Write a row's sequence to a file."""

    def restore(self, path: str | os.PathLike[str]) -> int:
        """Go on with a sequence that `save` wrote: its row."""

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The `forward` entry on inputs by name; a model with a cache is given an empty one (`positions` and `page_table` by default)."""
