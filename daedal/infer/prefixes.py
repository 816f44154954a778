"""Which beginnings of texts the cache still holds, so that a request that begins alike need not read them again.

A beginning is a number of whole pages, known by a name: a hash of the name before it and of the page's tokens. Whoever
starts gets a copy of the longest one that is known, on pages of its own: so a page has one owner, sequences stay side
by side in the pool, and no kernel knows of any of this (decision 019). What running requests hold can be copied as well
as what finished ones left behind on free pages, until those are handed out. Names start from a secret and from the
request's salt: nobody can make two texts of one name, or find out what strangers of another salt have asked.

Where layers keep rings (V4), a beginning needs a copy of them too, made when a sequence was just there. Knows tokens,
numbers of pages and of rings; no torch.
"""

import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from daedal.infer.pages import PageAllocator


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Rows to be copied before a step runs: page `sources[i]` to page `targets[i]`, all at once, and ring to ring."""

    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    ring: tuple[int, int] | None = None

    @cached_property
    def overlaps(self) -> bool:
        """Whether pages are read that are written too."""
        return not set(self.sources).isdisjoint(self.targets)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(source, target, count): the same in pieces that lie side by side on both sides."""
        found: list[tuple[int, int, int]] = []
        for source, target in zip(self.sources, self.targets, strict=True):
            if found and (source, target) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
                first, onto, count = found.pop()
                found.append((first, onto, count + 1))
            else:
                found.append((source, target, 1))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The longest beginning that a sequence can start behind: `num_tokens` on `pages`, with a copy of `ring`.

    known: tokens whose pages are there; more than `num_tokens` where a ring is lacking.
    """

    pages: tuple[int, ...] = ()
    num_tokens: int = 0
    known: int = 0
    ring: int | None = None


@dataclass(kw_only=True, eq=False)
class Chain:
    """One sequence as beginnings see it.

    salt: whose it is. names: of its beginnings, page by page, as far as they were needed. reuses: whether it may start
    behind one. most: tokens that may become one, None for all. num_noted: pages that have, since it was started.
    num_reused: tokens that it first started behind, None before. cuts: after so many tokens a chunk ends, and its rings
    are copied. copied: after how many they last were; answering: after how many, of its answer, 0 for none.
    """

    root: bytes
    salt: str
    reuses: bool
    most: int | None
    names: list[bytes] = field(default_factory=list)
    num_noted: int = 0
    num_reused: int | None = None
    cuts: tuple[int, ...] = ()
    copied: int = 0
    answering: int = 0


class Prefixes:
    """Beginnings on the pages of `pages`, `page_size` tokens each.

    unit: tokens, a multiple of `page_size`, of which a beginning is a multiple. rings: numbers of those in which copies
    may be kept; None where no layer has rings. max_drafts: tokens that may be fed and withdrawn in a step. keeps: False
    for none of all this. Counts in tokens, of first starts only: num_queried, those that might have been found, and
    num_hit, those that were.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        page_size: int,
        unit: int,
        rings: Iterable[int] | None = None,
        max_drafts: int = 0,
        keeps: bool = True,
    ):
        assert unit % page_size == 0
        self.unit = unit
        self.num_queried = self.num_hit = 0
        self._pages, self._page_size = pages, page_size
        self._keeps, self._max_drafts = keeps, max_drafts
        self._secret = secrets.token_bytes(32)
        self._page_of: dict[bytes, int] = {}
        self._name_on: dict[int, bytes] = {}
        self._has_rings = rings is not None
        self._free_rings = list(rings or ())
        self._ring_of: dict[bytes, int] = {}  # the one wanted longest ago first

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._keeps

    @property
    def hit_rate(self) -> float:
        """Of the tokens that might have been found, the share that was; 0 before there were any."""
        return self.num_hit / max(self.num_queried, 1)

    def chain(self, *, salt: str = "", reuses: bool = True, most: int | None = None) -> Chain:
        """For a new sequence."""
        root = blake2b(salt.encode(), key=self._secret, digest_size=32).digest()
        return Chain(root=root, salt=salt, reuses=reuses and self._keeps, most=most if self._keeps else 0)

    def find(self, chain: Chain, tokens: Sequence[int]) -> Found:
        """Where a sequence of these tokens can start; the last one is always left to be read."""
        if not chain.reuses:
            return Found()
        pages: list[int] = []
        for place in range(self._whole(len(tokens) - 1) // self._page_size):
            page = self._page_of.get(self._name(chain, tokens, place))
            if page is None:
                break
            pages.append(page)
        known = begin = self._whole(len(pages) * self._page_size)
        self._pages.wanted(reversed(pages))
        ring = None
        if self._has_rings:
            while begin and (ring := self._wanted_ring(self._ending(chain, tokens, begin))) is None:
                begin -= self.unit
        return Found(pages=tuple(pages[: begin // self._page_size]), num_tokens=begin, known=known, ring=ring)

    def begin(self, chain: Chain, tokens: Sequence[int], found: Found, table: Sequence[int], ring: int) -> Copy | None:
        """A sequence starts behind what was found; its pages may be among those that it has just been given, `table`,
        which `overwritten` was told of. ring: its own.
        """
        chain.copied, chain.answering = found.num_tokens, 0
        if self._has_rings and chain.most != 0:
            # The last place of what is to be read, and where others have gone on differently.
            chain.cuts = tuple(sorted({found.known, self._whole(len(tokens) - 1)}))
        if chain.num_reused is None and chain.reuses:
            chain.num_reused = found.num_tokens
            self.num_queried += len(tokens)
            self.num_hit += found.num_tokens
        if not found.pages:
            return None
        rings = None if found.ring is None else (found.ring, ring)
        return Copy(sources=found.pages, targets=tuple(table[: len(found.pages)]), ring=rings)

    def note(self, chain: Chain, tokens: Sequence[int], table: Sequence[int], end: int) -> None:
        """The first `end` tokens of a sequence have all their rows on the pages of `table`."""
        most = end if chain.most is None else min(end, chain.most)
        for place in range(chain.num_noted, most // self._page_size):
            name, page = self._name(chain, tokens, place), table[place]
            if name not in self._page_of:
                self._page_of[name], self._name_on[page] = page, name
                self._pages.mark(page)
            chain.num_noted = place + 1

    def leave(self, chain: Chain, tokens: Sequence[int], table: Sequence[int]) -> None:
        """The sequence gives its pages back after this: they stand in for others that are no longer there."""
        end, chain.num_noted = chain.num_noted * self._page_size, 0
        self.note(chain, tokens, table, end)
        chain.num_noted = 0

    def overwritten(self, pages: Iterable[int]) -> None:
        """These pages have a new owner."""
        for page in pages:
            name = self._name_on.pop(page, None)
            if name is not None:
                del self._page_of[name]

    def keep_ring(self, chain: Chain, tokens: Sequence[int], num_read: int, ring: int, *, answers: bool) -> Copy | None:
        """Before a sequence goes on after `num_read` tokens: a copy of its `ring` if another may start from here.

        Of an answer (`answers`) only the last such place is kept. Drafts may have carried it a few tokens further:
        rings are longer than needed by so many (`cache.REWIND`), and what drafts has read all but the last token.
        """
        if not self._has_rings:
            return None
        end = num_read
        of_answer = end not in chain.cuts
        if of_answer:
            end = self._whole(num_read - bool(self._max_drafts)) if answers else 0
        if end <= chain.copied or (chain.most is not None and end > chain.most):
            return None
        assert num_read - end <= self._max_drafts + 1
        chain.copied = end
        if of_answer:
            self._give_up_ring(chain, tokens)
            chain.answering = end
        name = self._ending(chain, tokens, end)
        if self._wanted_ring(name) is not None:
            return None
        kept = self._free_rings.pop() if self._free_rings else self._ring_of.pop(next(iter(self._ring_of)))
        self._ring_of[name] = kept
        return Copy(ring=(ring, kept))

    def names(self, chain: Chain, tokens: Sequence[int], count: int) -> list[bytes]:
        """Of the beginnings that end with the first `count` pages."""
        return [self._name(chain, tokens, place) for place in range(count)]

    def known(self, chain: Chain, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest beginning of these tokens that is there, rings or not."""
        pages: list[int] = []
        for name in self.names(chain, tokens, len(tokens) // self._page_size):
            if (page := self._page_of.get(name)) is None:
                break
            pages.append(page)
        return pages

    def rings(self, chain: Chain, tokens: Sequence[int]) -> dict[int, int]:
        """Copies of a sequence's rings, by the tokens that they follow, at most those noted."""
        ends = self._ends(chain.num_noted * self._page_size)
        found = {place: self._ring_of.get(self._ending(chain, tokens, place)) for place in ends}
        return {place: ring for place, ring in found.items() if ring is not None}

    def place_ring(self, chain: Chain, tokens: Sequence[int], end: int) -> int | None:
        """A free ring for what stands after `end` tokens, to be filled at once; None where there is none."""
        if end not in self._ends(len(tokens)) or not self._free_rings:
            return None
        name = self._ending(chain, tokens, end)
        if name in self._ring_of:
            return None
        self._ring_of[name] = ring = self._free_rings.pop()
        return ring

    def _ends(self, end: int) -> range:
        """Where beginnings with rings may end."""
        return range(self.unit, end + 1, self.unit) if self._has_rings else range(0)

    def forget(self) -> None:
        """Everything, also what running sequences hold or will leave behind."""
        self._secret = secrets.token_bytes(32)
        self._page_of.clear()
        self._name_on.clear()
        self._free_rings += self._ring_of.values()
        self._ring_of.clear()
        self._pages.forget()

    def _whole(self, num_tokens: int) -> int:
        return num_tokens // self.unit * self.unit

    def _give_up_ring(self, chain: Chain, tokens: Sequence[int]) -> None:
        """That of the answer so far, if there is one."""
        if chain.answering:
            ring = self._ring_of.pop(self._ending(chain, tokens, chain.answering), None)
            self._free_rings += [] if ring is None else [ring]

    def _wanted_ring(self, name: bytes) -> int | None:
        ring = self._ring_of.pop(name, None)
        if ring is not None:
            self._ring_of[name] = ring
        return ring

    def _ending(self, chain: Chain, tokens: Sequence[int], end: int) -> bytes:
        """The name of a sequence's first `end` tokens."""
        return self._name(chain, tokens, end // self._page_size - 1)

    def _name(self, chain: Chain, tokens: Sequence[int], place: int) -> bytes:
        """Of the beginning that ends with page `place`."""
        size = self._page_size
        for page in range(len(chain.names), place + 1):
            before = chain.names[-1] if chain.names else chain.root
            ids = array("I", tokens[page * size : (page + 1) * size])
            chain.names.append(blake2b(before + ids.tobytes(), digest_size=32).digest())
        return chain.names[place]
