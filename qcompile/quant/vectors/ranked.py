"""Two forms in one: of every group of tokens those that matter most are stored in the finer one (`kv4-zip`).

MiKV (arXiv:2402.18096) keeps tokens of little attention at low precision instead of dropping them; ZipCache (arXiv:2405.14256) says which
these are. `qcompile/ir/ranked_ops.py` ranks them; here is how a group is stored once its ranks are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.vector_format import VectorForm, vector_format

_PATTERN = re.compile(r"(?P<fine>.+) over (?P<coarse>.+) top (?P<salient>[1-9]\d*) of (?P<tokens>[1-9]\d*)")


@dataclass(frozen=True)
class RankedFormat:
    """Groups of t vectors, n of them in a fine form and the others in a coarse one; as text `int4 g64 over int3 g64 top 16 of 32`.

    The bytes of a group are its fine vectors in order, then its coarse ones, whatever ranks they have. Which is which is not among
    them: `encode` and `decode` take marks, bool [..., T] with n of every t true, in place of tables.

    Attributes:
        fine: of the vectors that are marked.
        coarse: of the others.
        salient: n.
        tokens: t.
    """

    fine: VectorForm
    coarse: VectorForm
    salient: int
    tokens: int
    tables: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return f"{self.fine} over {self.coarse} top {self.salient} of {self.tokens}"

    def width(self, size: int) -> int:
        """W: bytes of a vector of `size` numbers, on average over its group, rounded up: fewer than t bytes of a group are not used."""
        together = self.salient * self.fine.width(size) + (self.tokens - self.salient) * self.coarse.width(size)
        return -(-together // self.tokens)

    def calibrate(self, x: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """No tables."""
        del x, importance
        return ()

    def encode(self, x: Tensor, tables: Sequence[Tensor] = ()) -> Tensor:
        """X [..., T, D], T a multiple of t, with marks [..., T] as the only table: uint8 [..., T, W].

        Raises:
            FormatError: without marks.
        """
        marks = self._marks(tables)
        groups = x.numel() // (self.tokens * x.shape[-1])
        fine = self.fine.encode(x[marks]).view(groups, -1)
        coarse = self.coarse.encode(x[~marks]).view(groups, -1)
        unused = fine.new_zeros(groups, self.tokens * self.width(x.shape[-1]) - fine.shape[1] - coarse.shape[1])
        return torch.cat((fine, coarse, unused), dim=1).view(*x.shape[:-1], -1)

    def decode(self, packed: Tensor, size: int, dtype: torch.dtype = torch.float32, tables: Sequence[Tensor] = ()) -> Tensor:
        """Invert `encode` with the same marks: [..., T, D] as `dtype`."""
        marks = self._marks(tables)
        together = packed.reshape(-1, self.tokens * packed.shape[-1])
        border = self.salient * self.fine.width(size)
        end = border + (self.tokens - self.salient) * self.coarse.width(size)
        result = torch.empty(*packed.shape[:-1], size, dtype=dtype, device=packed.device)
        for form, part, mine in ((self.fine, together[:, :border], marks), (self.coarse, together[:, border:end], ~marks)):
            result[mine] = form.decode(part.reshape(-1, form.width(size)), size, dtype)
        return result

    def _marks(self, tables: Sequence[Tensor]) -> Tensor:
        if len(tables) != 1:
            raise FormatError(
                f"cache format {self}: expected the marks of fine tokens, got {len(tables)} tables; attend_ranked alone stores such "
                "a cache, for keys and values alike"
            )
        return tables[0]


def read_ranked(text: str) -> RankedFormat | None:
    """`int4 g64 asym over int2 g64 asym top 16 of 32`, or None for anything else.

    Raises:
        FormatError: for forms that are not per token or have tables, or a share that leaves one of them out.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    fine, coarse = vector_format(match["fine"]), vector_format(match["coarse"])
    salient, tokens = int(match["salient"]), int(match["tokens"])
    if any(part.tokens != 1 or part.tables for part in (fine, coarse)):
        raise FormatError(f"cache format {text!r}: expected two forms per token without tables, such as int4 g64 asym")
    if salient >= tokens:
        raise FormatError(f"cache format {text!r}: expected fewer fine tokens than {tokens}; with all of them fine, choose {fine}")
    return RankedFormat(fine, coarse, salient, tokens)
