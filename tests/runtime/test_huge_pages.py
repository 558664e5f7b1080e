"""Memory in huge pages: parts of it are zero, aligned and apart, and too much of it is refused."""

from __future__ import annotations

import pytest
import torch

from qcompile.runtime.huge_pages import ALIGNMENT, HUGE_PAGE, HugeMemory, aligned


@pytest.mark.parametrize("room", [4 * ALIGNMENT, HUGE_PAGE + 3 * ALIGNMENT], ids=["usual pages", "huge pages"])
def test_parts_are_zero_aligned_and_apart(room: int) -> None:
    memory = HugeMemory(room)
    shapes = [([3, 5], torch.int8), ([], torch.float32), ([2, 0], torch.float16), ([room - 2 * ALIGNMENT], torch.uint8)]
    parts = [memory.take(shape, dtype) for shape, dtype in shapes]
    assert [(list(part.shape), part.dtype) for part in parts] == shapes
    for number, part in enumerate(parts):
        assert part.data_ptr() % ALIGNMENT == 0
        assert not part.any()
        part.fill_(number + 1)
    assert all(bool((part == number + 1).all()) for number, part in enumerate(parts))


def test_huge_pages_begin_at_their_borders() -> None:
    assert HugeMemory(HUGE_PAGE).take([1], torch.uint8).data_ptr() % HUGE_PAGE == 0


def test_bytes_up_to_a_line() -> None:
    assert [aligned(size) for size in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]


def test_more_than_the_system_has_is_refused() -> None:
    with pytest.raises(MemoryError, match=f"expected {1 << 60} bytes of memory"):
        HugeMemory(1 << 60)
