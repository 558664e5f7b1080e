"""Hadamard matrices by construction (no tables), and the fast transform built on them.

A size n = m·2^k is transformed by `M ⊗ S_k`: M of order m, S_k Sylvester's matrix of order 2^k. M is a ±1 matrix with `M Mᵀ = m·I`
wherever one of Paley's two constructions (J. Math. Phys. 12, 1933) over a field of q elements, q a prime power, or a Kronecker
product of them gives one: m = q + 1 for q ≡ 3 (mod 4), m = 2(q + 1) for q ≡ 1 (mod 4).
Otherwise M is a seeded random orthogonal matrix of the order of n's odd part.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from qcompile.errors import FormatError


def hadamard_factors(size: int) -> tuple[int, int]:
    """(m, k) with size = m·2^k: the least m for which `hadamard_matrix(m)` exists, or else the odd part of `size`."""
    if size < 1:
        raise FormatError(f"hadamard of size {size}: expected at least 1 channel")
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    return next(((odd << j, twos - j) for j in range(twos + 1) if _exists(odd << j)), (odd, twos))


def is_exact(size: int) -> bool:
    """Whether the transform of `size` channels is a Hadamard matrix: every entry of magnitude 1/sqrt(size)."""
    return _exists(hadamard_factors(size)[0])


def hadamard_matrix(order: int) -> Tensor | None:
    """The ±1 matrix of `order` with orthogonal rows, float64 [m, m], or None where no construction is known here."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    way = _construction(order)
    if way is None:
        return None
    kind, argument = way
    if kind == "product":
        left, right = hadamard_matrix(argument), hadamard_matrix(order // argument)
        return None if left is None or right is None else torch.kron(left, right)
    return _paley_one(argument) if kind == "paley one" else _paley_two(argument)


def mixing_matrix(size: int, seed: int = 0) -> Tensor | None:
    """The orthogonal factor M/sqrt(m), float64 [m, m], of the transform of `size` channels; None where m = 1.

    `seed` decides it only where no Hadamard matrix is known.
    """
    order, _ = hadamard_factors(size)
    if order == 1:
        return None
    signs = hadamard_matrix(order)
    return random_orthogonal(order, seed) if signs is None else signs / order**0.5


def random_orthogonal(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix drawn uniformly (QR of a Gaussian, signs of R's diagonal made positive), float64 [size, size]."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    oriented: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return oriented


def random_signs(size: int, seed: int) -> Tensor:
    """Signs ±1, float64 [size]."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def sylvester(order: int) -> Tensor:
    """Sylvester's matrix of `order`, a power of two, scaled to be orthogonal: float64 [order, order], its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(order.bit_length() - 1):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    scaled: Tensor = matrix / order**0.5
    return scaled


def split_transform(matrix: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """L [a, a] and R [b, b], float64, with `M ⊗ S_k/sqrt(2^k) = L ⊗ R`, a·b = size and a, b as near to each other as powers of two allow.

    A vector seen as V [a, b] is then transformed by `L V Rᵀ`: two small matrix products, for a processor the fastest way.
    """
    left = torch.ones(1, 1, dtype=torch.float64) if matrix is None else matrix.double().contiguous()
    order, twos = left.shape[0], size // left.shape[0]
    while order < twos:
        order, twos = 2 * order, twos // 2
    return torch.kron(left, sylvester(order // left.shape[0])), sylvester(twos)


def fast_hadamard(x: Tensor, matrix: Tensor | None, size: int) -> Tensor:
    """`(M ⊗ S_k/sqrt(2^k)) v` for every run v of `size` channels along the last axis of x [..., blocks·size].

    Args:
        x: any float dtype, which is also the arithmetic's: widen it first where that matters.
        matrix: M [m, m], orthogonal (scaled already), or None for m = 1.
        size: m·2^k.
    """
    left, right = (factor.to(x.dtype) for factor in split_transform(matrix, size))
    grid = x.reshape(-1, left.shape[0], right.shape[0])
    return (left @ (grid @ right)).reshape(x.shape)  # R is its own transpose


def _exists(order: int) -> bool:
    return order in (1, 2) or _construction(order) is not None


@cache
def _construction(order: int) -> tuple[str, int] | None:
    """How to make the ±1 matrix of `order` > 2: ("paley one" or "paley two", q), ("product", first factor), or None."""
    if order < 4 or order % 4:
        return None
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return "paley one", order - 1
    half = order // 2 - 1
    if half % 4 == 1 and _prime_power(half):
        return "paley two", half
    factors = (factor for factor in range(2, order // 2 + 1) if order % factor == 0)
    return next((("product", factor) for factor in factors if _exists(factor) and _exists(order // factor)), None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, n) with q = p^n, p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    n = 1
    while p**n < q:
        n += 1
    return (p, n) if p**n == q else None


def _paley_one(q: int) -> Tensor:
    """I + S with S skew: order q + 1."""
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, corner=-1.0)


def _paley_two(q: int) -> Tensor:
    """The symmetric conference matrix with its entries 0, ±1 replaced by blocks: order 2(q + 1)."""
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, corner=1.0), off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _bordered(q: int, corner: float) -> Tensor:
    """Jacobsthal's matrix `chi(a - b)` with a row of ones and a column of `corner`, 0 where they meet: [q + 1, q + 1]."""
    p, n = _prime_power(q) or (q, 1)
    weights = p ** torch.arange(n)
    digits = (torch.arange(q).unsqueeze(1) // weights) % p
    difference = (((digits.unsqueeze(1) - digits.unsqueeze(0)) % p) * weights).sum(-1)
    result = torch.ones(q + 1, q + 1, dtype=torch.float64)
    result[1:, 0] = corner
    result[1:, 1:] = torch.tensor(_quadratic_character(p, n), dtype=torch.float64)[difference]
    result[0, 0] = 0.0
    return result


@cache
def _quadratic_character(p: int, n: int) -> tuple[float, ...]:
    """The character chi of the field of p^n elements (numbered by digits in base p): 0 at 0, 1 at squares, -1 elsewhere.

    Tries monic polynomials x^n - r(x) until the powers of x run through the whole group: even powers are the squares.
    """
    for reduction in itertools.product(range(p), repeat=n):
        powers = _powers(p, n, reduction)
        if len(set(powers)) == p**n - 1:
            squares = set(powers[::2])
            return (0.0, *(1.0 if element in squares else -1.0 for element in range(1, p**n)))
    raise AssertionError(f"the field of {p}^{n} elements has a generator")


def _powers(p: int, n: int, reduction: tuple[int, ...]) -> list[int]:
    """The numbers of the first p^n - 1 powers of x modulo `x^n = reduction(x)`, from x^0."""
    current = (1, *(0,) * (n - 1))
    numbers = []
    for _ in range(p**n - 1):
        numbers.append(sum(digit * p**place for place, digit in enumerate(current)))
        carry = current[-1]
        current = tuple((low + carry * digit) % p for low, digit in zip((0, *current[:-1]), reduction, strict=True))
    return numbers
