"""Changes of basis learned by gradient, on the orthogonal group and on positive diagonals.

What is brought down is the error that rounding is expected to leave in the outputs of linears: noise of variance step²/12 in each element,
times the energy of what the element is multiplied with. It needs no rounding, is smooth wherever the extreme element of a group stays the
same, and sees both operands. Shapes: inputs [tokens, K], weight [N, K], orthogonal maps [blocks, n, n], diagonals [blocks · n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

_MOMENTUM = 0.9
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """How many levels there are, and who shares a step: all that the noise of rounding depends on.

    Attributes:
        bits: of a code.
        group_size: columns that share a step; -1 is the whole row.
        symmetric: without a zero point.
        clip: share of the range that is kept.
        shared: whether all rows share one step (static quantization).
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    clip: float = 1.0
    shared: bool = False

    def variance(self, x: Tensor) -> Tensor:
        """Step²/12 of x [M, K] by groups: [M, G], or [1, G] where rows share a step."""
        groups = self.grouped(x)
        high, low = groups.amax(-1), groups.amin(-1)
        if self.shared:
            high, low = high.amax(0, keepdim=True), low.amin(0, keepdim=True)
        if self.symmetric:
            step = torch.maximum(high, -low) / (1 << (self.bits - 1))
        else:
            step = (high.clamp(min=0) - low.clamp(max=0)) / ((1 << self.bits) - 1)
        return (step * self.clip).square() / 12

    def grouped(self, x: Tensor) -> Tensor:
        """View [M, K] as [M, G, g]; the last group is filled up with 0."""
        size = x.shape[-1] if self.group_size == -1 else min(self.group_size, x.shape[-1])
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
        return padded.view(len(padded), -1, size)


@dataclass(frozen=True)
class Reading:
    """Linears that read one value, and inputs they have read.

    Attributes:
        inputs: [tokens, K].
        weight: rows of all of them, [N, K].
        runs: (first column, block of the map that acts there).
        input_grid: what inputs are rounded to, None where they are not.
        weight_grid: the same of weights.
    """

    inputs: Tensor
    weight: Tensor
    runs: tuple[tuple[int, int], ...]
    input_grid: Grid | None
    weight_grid: Grid | None

    @cached_property
    def signal(self) -> Tensor:
        """Mean square of an output, which no change of basis moves."""
        return (self.inputs @ self.weight.T).square().mean().clamp(min=_TINY)

    def noise(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The error expected of an output with these operands in the place of its own, relative to the signal: a scalar."""
        total = inputs.new_zeros(())
        for grid, rounded, other in ((self.input_grid, inputs, weight), (self.weight_grid, weight, inputs)):
            if grid is not None:
                energy = grid.grouped(other).square().sum(-1).mean(0)
                total = total + grid.variance(rounded).mean(0) @ energy
        return total / self.signal

    def on(self, tokens: slice) -> Reading:
        """The same of some of the tokens."""
        return replace(self, inputs=self.inputs[tokens])


Move = Callable[[Tensor, Reading, bool], Tensor]
"""(rows [M, K], whose they are, whether they are weights) -> the rows in another basis."""


@dataclass(frozen=True)
class Course:
    """How long and how fast.

    Attributes:
        steps: changes of the map.
        rate: of an orthogonal map the root mean square of the angles (radians) that the first steps turn it by; of a diagonal
            the change of a logarithm. Falls to 0.
        readings: drawn for each step.
        seed: of the drawing.
    """

    steps: int = 200
    rate: float = 0.02
    readings: int = 8
    seed: int = 0

    def draws(self, count: int) -> Iterator[tuple[list[int], float]]:
        """For each step the readings to look at, each as often as any other, and the share of the rate."""
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for step in range(self.steps):
            if not waiting:
                waiting = torch.randperm(count, generator=generator).tolist()
            yield waiting[: self.readings], 1 - step / self.steps
            waiting = waiting[self.readings :]


def mean_noise(readings: Sequence[Reading], move: Move) -> Tensor:
    """Of `Reading.noise` with both operands moved: a scalar."""
    found = [reading.noise(move(reading.inputs, reading, False), move(reading.weight, reading, True)) for reading in readings]
    return torch.stack(found).mean()


def rotating(maps: Tensor) -> Move:
    """Rows under orthogonal maps [blocks, n, n]; columns that belong to no block stay."""

    def move(rows: Tensor, reading: Reading, dual: bool) -> Tensor:
        del dual
        return _by_runs(rows, reading, maps.shape[-1], lambda part, block: part @ maps[block].T)

    return move


def scaling(logarithms: Tensor, blocks: int, behind: Callable[[Tensor], Tensor] | None = None) -> Move:
    """Rows times `exp(logarithms)` [blocks · n], weights divided by it; `behind` is what happens to both before they are rounded."""
    parts = logarithms.view(blocks, -1)

    def move(rows: Tensor, reading: Reading, dual: bool) -> Tensor:
        scaled = _by_runs(rows, reading, parts.shape[1], lambda part, block: part * (-parts[block] if dual else parts[block]).exp())
        return scaled if behind is None else behind(scaled)

    return move


def _by_runs(rows: Tensor, reading: Reading, size: int, act: Callable[[Tensor, int], Tensor]) -> Tensor:
    pieces, done = [], 0
    for start, block in sorted(reading.runs):
        pieces += [rows[:, done:start], act(rows[:, start : start + size], block)]
        done = start + size
    return torch.cat([*pieces, rows[:, done:]], dim=1)


def learn_orthogonal(
    readings: Sequence[Reading], start: Tensor, course: Course, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Maps [blocks, n, n] that leave less noise than `start`, orthogonal up to float32.

    Cayley steps with momentum along the gradient within the group (SpinQuant, arXiv:2405.16406), normalised to an angle.
    """
    maps = start.float()
    momentum = torch.zeros_like(maps)
    for step, (drawn, share) in enumerate(course.draws(len(readings))):
        leaf = maps.detach().requires_grad_()
        with torch.enable_grad():
            noise = mean_noise([readings[index] for index in drawn], rotating(leaf))
        gradient = torch.autograd.grad(noise, leaf)[0] @ maps.mT
        maps, momentum = turned(maps, momentum, gradient, course.rate * share)
        if progress is not None:
            progress(step + 1, course.steps)
    return maps


def turned(maps: Tensor, momentum: Tensor, gradient: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """One Cayley step with momentum: maps [..., n, n] turned by `angle` (radians, root mean square), and the new momentum.

    `gradient` is in the maps times the maps transposed; its antisymmetric part lies in the group.
    """
    momentum = _MOMENTUM * momentum + (gradient - gradient.mT)
    size = momentum.flatten(-2).norm(dim=-1).clamp(min=_TINY) / maps.shape[-1] ** 0.5
    turn = momentum * (-angle / 2 / size)[..., None, None]
    return torch.linalg.solve(torch.eye(maps.shape[-1]) - turn, maps + turn @ maps), momentum


def learn_diagonal(
    readings: Sequence[Reading], start: Tensor, blocks: int, course: Course, behind: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Logarithms [blocks · n] of a diagonal that leaves less noise than `start`, by Adam (OSTQuant, arXiv:2501.13987)."""
    leaf = start.float().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=course.rate)
    for drawn, share in course.draws(len(readings)):
        optimizer.param_groups[0]["lr"] = course.rate * share
        with torch.enable_grad():
            noise = mean_noise([readings[index] for index in drawn], scaling(leaf, blocks, behind))
        leaf.grad = torch.autograd.grad(noise, leaf)[0]
        optimizer.step()
    return leaf.detach()
