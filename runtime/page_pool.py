"""Pages, each held by the sequences that share it."""

from __future__ import annotations

import heapq


class PagePool:
    """Which pages are free and how many sequences hold each other one; the lowest free page is given out first."""

    def __init__(self, pages: int) -> None:
        """All pages are free."""
        self.pages = pages
        self._holders = [0] * pages
        self._free = list(range(pages))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """A free page, now held once; the caller has seen to it that there is one."""
        page = heapq.heappop(self._free)
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One holder more of a page that is held."""
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; a page without any is free."""
        self._holders[page] -= 1
        if not self._holders[page]:
            heapq.heappush(self._free, page)
