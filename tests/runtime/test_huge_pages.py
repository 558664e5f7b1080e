"""Memory in huge pages: parts of it are zero, aligned and apart, and too much of it is refused."""

from __future__ import annotations

import pytest
import torch

from qcompile.runtime.huge_pages import ALIGNMENT, HUGE_PAGE, huge_zeros


@pytest.mark.parametrize("size", [100, HUGE_PAGE + 100], ids=["usual pages", "huge pages"])
def test_parts_are_zero_aligned_and_apart(size: int) -> None:
    kinds = [([3, 5], torch.int8), ([], torch.float32), ([2, 0], torch.float16), ([size], torch.uint8), ([7], torch.bfloat16)]
    parts = huge_zeros(kinds)
    assert [(list(part.shape), part.dtype) for part in parts] == kinds
    for number, part in enumerate(parts):
        assert part.data_ptr() % ALIGNMENT == 0
        assert not part.any()
        part.fill_(number + 1)
    assert all(bool((part == number + 1).all()) for number, part in enumerate(parts))


def test_huge_pages_begin_at_their_borders() -> None:
    assert huge_zeros([([HUGE_PAGE], torch.uint8)])[0].data_ptr() % HUGE_PAGE == 0


def test_nothing_takes_nothing() -> None:
    assert huge_zeros([]) == []


def test_more_than_the_system_has_is_refused() -> None:
    with pytest.raises(MemoryError, match=f"expected {1 << 60} bytes of memory"):
        huge_zeros([([1 << 60], torch.uint8)])
