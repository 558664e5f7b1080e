"""What can be measured of an activation, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.quant.precision import medium_precision

_SAMPLE_SEED = 0
_RESERVOIR = 4096
"""Magnitudes kept per channel for percentiles."""


class Collector:
    """Takes in rows [tokens, K], gives a result of fixed size."""

    def __init__(self, size: int, parameter: float) -> None:
        """For `size` channels; what `parameter` means depends on the statistic."""
        self.size, self.parameter = size, parameter

    def bytes(self) -> int:
        """What it holds meanwhile."""
        return 8 * self.size

    def add(self, rows: Tensor) -> None:
        """Take in float32 rows [tokens, K]."""
        raise NotImplementedError

    def result(self) -> Tensor:
        """The statistic."""
        raise NotImplementedError


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of `XᵀX` of float32 rows X [tokens, K] to `total` [K, K], by blocks of columns that may reach above it.

    Operands may be rounded to bfloat16 (`medium_precision`), sums stay float32: exactly `XᵀX` of rows within 2⁻⁹ of these. A product of
    bfloat16 matrices would be faster where there are no tiles for it, but rounds its result to 2⁻⁹ of an entry: as much as the smaller
    eigenvalues of anisotropic inputs, which a factorisation then takes for negative ones.
    """
    size = rows.shape[1]
    step = max(_LEAST_BLOCK, -(-size // _BLOCKS))
    with medium_precision():
        for start in range(0, size, step):
            total[start:, start : start + step].addmm_(rows[:, start:].T, rows[:, start : start + step])


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return total.tril() + total.tril(-1).T


def gram(rows: Tensor) -> Tensor:
    """`XᵀX` of float32 rows X [tokens, K], exactly symmetric: see `add_gram`."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(total, rows)
    return mirrored(total)


_BLOCKS = 4
_LEAST_BLOCK = 192
"""More blocks save more of what is computed twice, but are slower each."""


class SecondMoment(Collector):
    """`XᵀX / tokens`, float32 [K, K]."""

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, parameter)
        self._sum = torch.zeros(size, size)
        self._count = 0

    def bytes(self) -> int:
        """The sum in float32."""
        return 4 * self.size * self.size

    def add(self, rows: Tensor) -> None:
        """Add the outer products."""
        add_gram(self._sum, rows)
        self._count += len(rows)

    def result(self) -> Tensor:
        """The mean over tokens, exactly symmetric."""
        return mirrored(self._sum).div_(max(self._count, 1))


class AbsMax(Collector):
    """The largest magnitude per channel, float32 [K]."""

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, parameter)
        self._largest = torch.zeros(size)

    def add(self, rows: Tensor) -> None:
        """Compare."""
        if len(rows):
            self._largest = torch.maximum(self._largest, rows.abs().amax(0))

    def result(self) -> Tensor:
        """The maxima."""
        return self._largest


class AbsMean(Collector):
    """The mean magnitude per channel, float32 [K]."""

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, parameter)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Add magnitudes."""
        self._sum += rows.abs().sum(0, dtype=torch.float64)
        self._count += len(rows)

    def result(self) -> Tensor:
        """Their mean."""
        return (self._sum / max(self._count, 1)).float()


class Range(Collector):
    """The smallest and largest value per channel, float32 [2, K]."""

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, parameter)
        self._low, self._high = torch.full((size,), torch.inf), torch.full((size,), -torch.inf)

    def add(self, rows: Tensor) -> None:
        """Compare."""
        if len(rows):
            self._low, self._high = torch.minimum(self._low, rows.amin(0)), torch.maximum(self._high, rows.amax(0))

    def result(self) -> Tensor:
        """Minima in row 0, maxima in row 1."""
        return torch.stack((self._low, self._high))


class Sample(Collector):
    """Rows drawn uniformly from all tokens: float32 [min(parameter, tokens), K], in the order of the text.

    Each row gets a random key as it comes and the smallest keys are kept (reservoir sampling, Vitter 1985), so that one pass is enough.
    """

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, parameter)
        self._rows, self._keys, self._places = torch.empty(0, size), torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(_SAMPLE_SEED)

    def bytes(self) -> int:
        """The rows."""
        return 4 * self.size * int(self.parameter)

    def add(self, rows: Tensor) -> None:
        """Draw keys and keep the smallest."""
        drawn = torch.rand(len(rows), dtype=torch.float64, generator=self._generator)
        keys = torch.cat((self._keys, drawn))
        kept = keys.argsort(stable=True)[: int(self.parameter)]
        old, new = kept[kept < len(self._keys)], kept[kept >= len(self._keys)] - len(self._keys)
        self._rows, self._places = torch.cat((self._rows[old], rows[new])), torch.cat((self._places[old], new + self._seen))
        self._keys = torch.cat((self._keys[old], drawn[new]))
        self._seen += len(rows)

    def result(self) -> Tensor:
        """The rows in order."""
        return self._rows[self._places.argsort()]


class Percentile(Sample):
    """The magnitude below which `parameter` (0 to 1) of a channel's values lie, from 4096 sampled tokens; float32 [K]."""

    def __init__(self, size: int, parameter: float) -> None:
        super().__init__(size, _RESERVOIR)
        self._share = parameter

    def result(self) -> Tensor:
        """Interpolated linearly between the two nearest."""
        rows = super().result().abs()
        return torch.quantile(rows, self._share, dim=0) if len(rows) else torch.zeros(self.size)


COLLECTORS: dict[str, Callable[[int, float], Collector]] = {
    "second_moment": SecondMoment, "absmax": AbsMax, "absmean": AbsMean, "range": Range, "sample": Sample, "percentile": Percentile,
}  # fmt: skip


def channels_last(value: Any, axis: int) -> Tensor:
    """The value as float32 with its channel axis moved to the end."""
    tensor: Tensor = value if isinstance(value, Tensor) else value[0]
    return tensor.movedim(axis, -1).float()
