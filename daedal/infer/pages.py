"""Which pages of the cache are free. Plain integers: it does not know what a page holds, or who asks.

Any free page would do, but attention reads a sequence whose pages follow one another without copying it. So a sequence
grows in place while the next page is free, and a new one starts in the middle of the widest gap, where it and its
neighbour both have room. A lone sequence starts at page 0 and never breaks.
"""

import re
from collections.abc import Iterable

_FREE, _USED = 1, 0
_FREE_RUN = re.compile(rb"\x01+")


class PageAllocator:
    """Hands out the pages 0 .. num_pages - 1, each to one owner at a time."""

    def __init__(self, num_pages: int):
        self._state = bytearray([_FREE]) * num_pages
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        return len(self._state)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return len(self._state) - self._num_free

    def allocate(self, count: int, *, after: int | None = None) -> tuple[int, ...] | None:
        """`count` pages in the order of their use, or None, and then nothing is taken, if fewer are free.

        `after`: the page that they continue, if any.
        """
        if count > self._num_free:
            return None
        pages: list[int] = []
        if after is not None:
            self._take_run(after + 1, count, pages)
        while len(pages) < count:
            self._take_run(self._start(count - len(pages)), count, pages)
        return tuple(pages)

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back. Raises ValueError for a page that is not in use, and then takes none."""
        returned = tuple(pages)
        idle = [page for page in returned if not 0 <= page < len(self._state) or self._state[page] == _FREE]
        if idle or len(set(returned)) < len(returned):
            raise ValueError(f"pages {list(returned)} cannot be freed: each must be in use and named once")
        for page in returned:
            self._state[page] = _FREE
        self._num_free += len(returned)

    def _take_run(self, page: int, count: int, pages: list[int]) -> None:
        """Takes free pages from `page` upwards until `pages` holds `count` of them or the run ends."""
        while len(pages) < count and page < len(self._state) and self._state[page] == _FREE:
            self._state[page] = _USED
            self._num_free -= 1
            pages.append(page)
            page += 1

    def _start(self, count: int) -> int:
        """The first page of a new run of about `count` pages."""
        widest = max(_FREE_RUN.finditer(self._state), key=lambda run: run.end() - run.start())
        first, end = widest.span()
        middle = (first + end) // 2
        has_neighbour = first > 0
        return middle if has_neighbour and end - middle >= count else first
