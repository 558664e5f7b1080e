"""One layer of a cache that keeps some tokens as they came, stepped by the reference operators, by its kernels beside them where asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.ir.lowered import KernelSpec, item_operand
from qcompile.ir.retention_ops import attend_settled, retain_, settle_, with_recent
from qcompile.quant.retention import Retention
from qcompile.quant.scheme import DTYPE_NAMES
from qcompile.quant.vector_format import vector_format
from tests.codegen.triton import settled_specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel


def chunk_positions(starts: Sequence[int], counts: Sequence[int], width: int = 0, scattered: bool = False) -> Tensor:
    """Positions [B, S] of the next tokens of each sequence; padding behind them, or anywhere in between."""
    width = max(width, *counts)
    positions = torch.full((len(starts), width), -1)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        places = torch.randperm(width)[:count].sort().values if scattered else torch.arange(count)
        positions[row, places] = torch.arange(start, start + count)
    return positions


@dataclass
class Layer:
    """Pages and rows of keys and of values; with `kernels` each step compares what they and the reference write, bit for bit."""

    policy: Retention
    forms: tuple[str, str]
    heads: int
    size: int
    batch: int
    page_tokens: int
    pages: int
    dtype: str = "bf16"
    rows_dtype: str = "bf16"
    kernels: bool = False
    run: Callable[[KernelSpec, dict[str, Tensor], Mapping[str, int]], object] = run_kernel
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Pages that are shuffled and full of ones, rows that are NaN; a page and a row belong to nobody."""
        self.lengths = [0] * self.batch
        order = torch.randperm(self.batch * self.pages) + 1
        self.table = guarded(order.view(self.batch, self.pages).to(torch.int32))
        self.slots = guarded(torch.randperm(self.batch).to(torch.int32) + 1)
        kind = DTYPE_NAMES[self.rows_dtype]
        widths = [vector_format(form).width(self.size) for form in self.forms]
        # Where channels are sorted, an order for each head.
        orders = [torch.stack([torch.randperm(self.size) for _ in range(self.heads)]).to(torch.uint8) for _ in widths]
        self.tables = [[guarded(order)] if vector_format(form).tables else [] for form, order in zip(self.forms, orders, strict=True)]
        # 255 everywhere: scales and least values that nobody has written are NaN.
        self.stored = [
            guarded(torch.full((self.batch * self.pages + 1, self.heads, self.page_tokens, width), 255, dtype=torch.uint8))
            for width in widths
        ]
        self.rows = [guarded(torch.full((self.batch + 1, self.heads, self.policy.rows, self.size), torch.nan, dtype=kind)) for _ in widths]

    @property
    def sizes(self) -> dict[str, int]:
        """What grids and parameters call the cache's sizes."""
        return {"pages": self.pages, "page_tokens": self.page_tokens}

    def step(self, positions: Tensor, spread: float = 1.0, centre: float = 1.0) -> tuple[list[Tensor], Tensor]:
        """Take in new tokens at `positions` [B, S]: what `with_recent` gave for keys and values, and the positions as kernels get them."""
        batch, sequence = positions.shape
        at = guarded(positions)
        sizes = {**self.sizes, "batch": batch, "sequence": sequence, "rows": batch * sequence}
        exact = []
        for part, form in enumerate(self.forms):
            wide = torch.randn(batch, sequence, self.heads + 1, self.size) * spread + torch.randn(self.size) * centre
            x = guarded(wide.to(DTYPE_NAMES[self.dtype]))[:, :, 1:].transpose(1, 2)
            exact.append(self._with_recent(self.rows[part], x, sizes))
            self._settle(part, form, exact[-1], at, sizes)
            self._retain(part, exact[-1], at, sizes)
        self.lengths = [max(length, int(row.max()) + 1) for length, row in zip(self.lengths, positions, strict=True)]
        return exact, at

    def attend(
        self, heads: int, positions: Tensor, bucket: str, *, window: int = 0, softcap: float = 0.0, sinks: bool = False
    ) -> None:  # fmt: skip
        """One step, and attention of queries [B, heads, S, D], a view of a fused matrix, against the definition in float64."""
        exact, at = self.step(positions)
        batch, sequence = positions.shape
        kind = DTYPE_NAMES[self.dtype]
        query = guarded(torch.randn(batch, sequence, heads + 2, self.size).to(kind))[:, :, 1 : heads + 1].transpose(1, 2)
        out = result((batch, sequence, heads, self.size), kind)
        stored = dict(zip(("keys", "values", "exact_keys", "exact_values"), (*self.stored, *exact), strict=True))
        extra = {"sinks": guarded(torch.randn(heads))} if sinks else {}
        tables = dict(zip(("k_tables", "v_tables"), self.tables, strict=True))
        extra |= {item_operand(name, 0): table for name, given in tables.items() for table in given}
        operands = {"q": query, **stored, "page_table": self.table, "positions": at, "out": out.transpose(1, 2), **extra}
        spec = settled_specs.attend_settled(
            heads, self.heads, self.size, bucket, self.forms, self.policy,
            dtype=self.dtype, rows=self.rows_dtype, window=window, softcap=softcap, sinks="fp32" if sinks else None,
        )  # fmt: skip
        self.run(spec, operands, {**self.sizes, "batch": batch, "sequence": sequence, "rows": batch * sequence})
        expected = attend_settled(
            query.double(), *stored.values(), self.table, positions, *self.forms, **settled_specs.policy_options(self.policy),
            scale=self.size**-0.5, window=window, softcap=softcap, sinks=extra["sinks"].double() if sinks else None, **tables,
        )  # fmt: skip
        assert_close(operands["out"], expected)
        assert not bool(out[positions < 0].any()), "a padding query gives 0"

    def attend_in_chunks(self, heads: int, counts: Sequence[Sequence[int]], **options: float) -> None:
        """Chunks of the sequences of a batch, one after the other, each attended to."""
        for count in counts:
            self.attend(heads, chunk_positions(self.lengths, count), "m1" if max(count) == 1 else "m2-63", **options)

    def _with_recent(self, rows: Tensor, x: Tensor, sizes: dict[str, int]) -> Tensor:
        if not self.kernels:
            return guarded(with_recent(rows, x, self.slots))
        out = result((x.shape[0], self.heads, self.policy.rows + x.shape[2], self.size), rows.dtype)
        spec = settled_specs.with_recent(self.heads, self.size, self.policy, self.dtype, self.rows_dtype)
        self.run(spec, {"rows": rows, "x": x, "slots": self.slots, "out": out}, sizes)
        same(out, with_recent(rows, x, self.slots))
        return out

    def _settle(self, part: int, form: str, exact: Tensor, positions: Tensor, sizes: dict[str, int]) -> None:
        expected = self.stored[part].clone() if self.kernels else self.stored[part]
        tables = self.tables[part]
        settle_(expected, exact, self.table, positions, form, **settled_specs.policy_options(self.policy), tables=tables)
        if not self.kernels:
            return
        operands = {"pages": self.stored[part], "exact": exact, "page_table": self.table, "positions": positions}
        operands |= {item_operand("tables", 0): table for table in tables}
        self.run(settled_specs.settle(self.heads, self.size, form, self.policy, self.rows_dtype), operands, sizes)
        assert torch.equal(self.stored[part], expected)

    def _retain(self, part: int, exact: Tensor, positions: Tensor, sizes: dict[str, int]) -> None:
        expected = self.rows[part].clone() if self.kernels else self.rows[part]
        retain_(expected, exact, self.slots, positions, **settled_specs.policy_options(self.policy))
        if not self.kernels:
            return
        operands = {"rows": self.rows[part], "exact": exact, "slots": self.slots, "positions": positions}
        self.run(settled_specs.retain(self.heads, self.size, self.policy, self.rows_dtype), operands, sizes)
        same(self.rows[part], expected)


def same(got: Tensor, expected: Tensor) -> None:
    """Equal bit for bit; a NaN is equal to a NaN."""
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
