"""Which pages of the cache are free. Plain integers: it does not know what a page holds, or who asks.

Any free page would do, but attention reads a sequence whose pages follow one another without copying it. So a sequence
grows in place while the next page is free, and a new one starts in the middle of the widest gap, where it and its
neighbour both have room. A lone sequence starts at page 0 and never breaks.

A free page may be kept: its rows are still good, and might be wanted again. That holds nobody up: a kept page is as
free as a blank one, and is handed out where no blank one is in a fitting place, those first that were wanted longest
ago.
"""

import re
from collections.abc import Iterable

_USED, _BLANK, _KEPT = 0, 1, 2
_BLANK_RUN = re.compile(rb"\x01+")
_FREE_RUN = re.compile(rb"[\x01\x02]+")
_ONLY_BLANK = bytes(state == _BLANK for state in range(256))


class PageAllocator:
    """Hands out the pages 0 .. num_pages - 1, each to one owner at a time."""

    def __init__(self, num_pages: int):
        self._state = bytearray([_BLANK]) * num_pages
        self._num_free = num_pages
        self._marked: set[int] = set()  # of those in use
        self._kept: dict[int, int] = {}  # page: when it was last wanted; the oldest first
        self._now = 0

    @property
    def num_pages(self) -> int:
        return len(self._state)

    @property
    def num_free(self) -> int:
        """Kept ones included."""
        return self._num_free

    @property
    def num_used(self) -> int:
        return len(self._state) - self._num_free

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def allocate(self, count: int, *, after: int | None = None) -> tuple[int, ...] | None:
        """`count` pages in the order of their use, or None, and then nothing is taken, if fewer are free.

        `after`: the page that they continue, if any. Kept pages among them are kept no longer.
        """
        if count > self._num_free:
            return None
        pages: list[int] = []
        if after is not None:
            page = after + 1
            while len(pages) < count and self._may_grow_onto(page):
                self._take(page, pages)
                page += 1
        while len(pages) < count:
            page = self._start(count - len(pages))
            while len(pages) < count and page < len(self._state) and self._state[page] != _USED:
                self._take(page, pages)
                page += 1
        return tuple(pages)

    def allocate_blank(self, count: int) -> tuple[int, ...] | None:
        """`count` blank pages, in the narrowest gap that holds them side by side, else the first ones; None, and then
        nothing is taken, if there are fewer.
        """
        gaps = sorted(_BLANK_RUN.finditer(self._state), key=_length)
        fitting = next((gap for gap in gaps if _length(gap) >= count), None)
        chosen = [fitting] if fitting is not None else sorted(gaps, key=re.Match.start)
        free = [page for gap in chosen for page in range(*gap.span())][:count]
        if len(free) < count:
            return None
        pages: list[int] = []
        for page in free:
            self._take(page, pages)
        return tuple(pages)

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back; of those to be kept the first count as wanted longest ago. Raises ValueError for a page
        that is not in use, and then takes none.
        """
        returned = tuple(pages)
        idle = [page for page in returned if not 0 <= page < len(self._state) or self._state[page] != _USED]
        if idle or len(set(returned)) < len(returned):
            raise ValueError(f"pages {list(returned)} cannot be freed: each must be in use and named once")
        self._now += 1
        for page in returned:
            self._state[page] = _BLANK
            if page in self._marked:
                self._marked.discard(page)
                self._state[page] = _KEPT
                self._kept[page] = self._now
        self._num_free += len(returned)

    def mark(self, page: int) -> None:
        """A page in use is to be kept once it is free."""
        assert self._state[page] == _USED
        self._marked.add(page)

    def wanted(self, pages: Iterable[int]) -> None:
        """Those of `pages` that are kept were wanted just now, the last of them latest."""
        self._now += 1
        for page in pages:
            if self._kept.pop(page, None) is not None:
                self._kept[page] = self._now

    def forget(self) -> None:
        """Nothing that is or was written is to be kept."""
        for page in self._kept:
            self._state[page] = _BLANK
        self._kept.clear()
        self._marked.clear()

    def _take(self, page: int, pages: list[int]) -> None:
        self._state[page] = _USED
        self._kept.pop(page, None)
        self._num_free -= 1
        pages.append(page)

    def _may_grow_onto(self, page: int) -> bool:
        """Whether it is blank, or nearer to the page wanted longest ago than to now: lying side by side is not worth
        a beginning that many requests share.
        """
        if page >= len(self._state) or self._state[page] == _USED:
            return False
        if self._state[page] == _BLANK:
            return True
        oldest = next(iter(self._kept.values()))
        return 2 * self._kept[page] <= oldest + self._now

    def _start(self, count: int) -> int:
        """The first page of a new run of about `count` pages."""
        blank = max(_BLANK_RUN.finditer(self._state), key=_length, default=None)
        if blank is not None and (_length(blank) >= count or not self._kept):
            first, end = blank.span()
            middle = (first + end) // 2
            has_neighbour = first > 0
            return middle if has_neighbour and end - middle >= count else first
        oldest = self._oldest_run(count)
        return max(_FREE_RUN.finditer(self._state), key=_length).start() if oldest is None else oldest

    def _oldest_run(self, count: int) -> int | None:
        """Where `count` free pages lie side by side, of the kept ones among them the newest as old as can be."""
        given_up = self._state.translate(_ONLY_BLANK)
        for page in self._kept:
            given_up[page] = True
            first = given_up.rfind(False, 0, page) + 1
            end = given_up.find(False, page)
            if (end if end >= 0 else len(given_up)) - first >= count:
                return first
        return None


def _length(run: re.Match[bytes]) -> int:
    return run.end() - run.start()
