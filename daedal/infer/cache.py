"""The paged cache: for every cache slot of the model a pool, and a view of it for each step.

What is kept is decided by `shapes.cache`; nothing else is allocated. Rows that stay lie on pages, as many rows to a
page as its tokens fill; rows of which only the last few are read lie in a ring, one ring for each sequence that may run
at once. Where a row lies follows from its position alone, so a cache is rewound by saying a smaller past: nothing is
undone, rows beyond are simply written again, and rings are a little longer than needed so that a few rejected tokens
cannot have overwritten what is still wanted. The pools are not cleared: rows that were never written may hold anything,
and are never read. Does not know whose pages these are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from daedal import shapes
from daedal.config import ModelConfig
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows
from daedal.shapes import Slot

REWIND = 8  # tokens that may be fed and then withdrawn


def page_multiple(config: ModelConfig) -> int:
    """Tokens that every page must be a multiple of: whole rows of each slot. 1, in V4 the longest window, 128."""
    return math.lcm(*(slot.rate for slot in shapes.cache(config, drafting=True)))


def page_nbytes(config: ModelConfig, page_size: int, dtype: torch.dtype, *, drafting: bool = False) -> int:
    """Bytes of one page of `page_size` tokens over all layers and slots, rows kept in `dtype`."""
    paged = (slot for slot in shapes.cache(config, drafting=drafting) if not slot.ring)
    return sum(page_size // slot.rate * slot.numel * _kept(slot, dtype).itemsize for slot in paged)


def state_nbytes(config: ModelConfig, dtype: torch.dtype, *, drafting: bool = False) -> int:
    """Bytes of the rings of one sequence over all layers and slots, rows kept in `dtype`; 0 for most families."""
    rings = (slot for slot in shapes.cache(config, drafting=drafting) if slot.ring)
    return sum(_ring_rows(slot) * slot.numel * _kept(slot, dtype).itemsize for slot in rings)


def _ring_rows(slot: Slot) -> int:
    return slot.ring + REWIND


def _kept(slot: Slot, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if slot.wide and dtype != torch.float64 else dtype


class PagedCache:
    """A pool for every slot of every layer.

    Paged slots: [P, N / rate, *slot shape] for `num_pages` pages of `page_size` tokens. Ring slots: [num_states, ring
    + REWIND, *slot shape]. drafting: also for the model's own drafting modules, as layers after the last.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_states: int = 1,
        drafting: bool = False,
    ):
        assert page_size % page_multiple(config) == 0
        self.page_size = page_size
        self._device = torch.device(device)
        self._slots: dict[tuple[int, str], Slot] = {}
        self._pools: dict[int, dict[str, Tensor]] = {}
        for slot in shapes.cache(config, drafting=drafting):
            assert slot.layer is not None
            rows = (num_states, _ring_rows(slot)) if slot.ring else (num_pages, page_size // slot.rate)
            pool = torch.empty((*rows, *slot.shape), dtype=_kept(slot, dtype), device=device)
            self._pools.setdefault(slot.layer, {})[slot.name] = pool
            self._slots[slot.layer, slot.name] = slot

    @property
    def pools(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Layer to slot name to pool."""
        return self._pools

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools.values())

    def view(
        self,
        tables: Sequence[Sequence[int]],
        pasts: Sequence[int],
        counts: Sequence[int],
        states: Sequence[int] | None = None,
    ) -> "PagedView":
        """The cache for one step: sequence i has `pasts[i]` tokens on the pages `tables[i]` and brings `counts[i]`.

        states: the ring of each sequence; by default ring i for sequence i.
        """
        for table, past, count in zip(tables, pasts, counts, strict=True):
            assert past + count <= len(table) * self.page_size
        return PagedView(
            pools=self._pools,
            slots=self._slots,
            places=_Places(
                tables=tuple(tuple(table) for table in tables),
                pasts=tuple(pasts),
                counts=tuple(counts),
                states=tuple(range(len(tables)) if states is None else states),
                page_size=self.page_size,
                device=self._device,
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedView:
    """One step's `CacheView`."""

    pools: Mapping[int, Mapping[str, Tensor]]
    slots: Mapping[tuple[int, str], Slot]
    places: "_Places"

    def extend(self, layer: int, *, rate: int = 1, **slots: Tensor) -> Mapping[str, Rows]:
        """As `CacheView.extend`; rows are kept in the pools' dtype. ValueError for slots that the layer lacks."""
        return {name: self._extend(layer, name, rate, rows) for name, rows in slots.items()}

    def _extend(self, layer: int, name: str, rate: int, rows: Tensor) -> Rows:
        slot = self.slots.get((layer, name))
        if slot is None or slot.rate != rate:
            kept = sorted(f"{known.name} (rate {known.rate})" for known in self.slots.values() if known.layer == layer)
            raise ValueError(f"layer {layer} stores {name!r} at rate {rate}: the cache keeps {', '.join(kept)}")
        pool = self.pools[layer][name]
        rows = rows.to(pool.dtype)
        if slot.ring:
            return self.places.ring(slot.ring, pool.shape[1]).extend(pool, rows)
        written, pages = self.places.paged(rate)
        pool.flatten(0, 1).index_copy_(0, written, rows)
        return PagedRows(pool, pages)


class _Places:
    """Where a step's rows lie, worked out once for all layers."""

    def __init__(
        self,
        *,
        tables: tuple[tuple[int, ...], ...],
        pasts: tuple[int, ...],
        counts: tuple[int, ...],
        states: tuple[int, ...],
        page_size: int,
        device: torch.device,
    ):
        self._tables, self._pasts, self._counts, self._states = tables, pasts, counts, states
        self._page_size, self._device = page_size, device
        self._paged: dict[int, tuple[Tensor, Pages]] = {}
        self._rings: dict[tuple[int, int], _Ring] = {}

    def paged(self, rate: int) -> tuple[Tensor, Pages]:
        """Where new rows of `rate` tokens go, as indices into a pool's rows, and where all rows lie."""
        if rate not in self._paged:
            size = self._page_size // rate
            written: list[int] = []
            for table, past, count in zip(self._tables, self._pasts, self._counts, strict=True):
                new = range(past // rate, (past + count) // rate)
                written.extend(table[row // size] * size + row % size for row in new)
            totals = (past + count for past, count in zip(self._pasts, self._counts, strict=True))
            pages = Pages(self._tables, tuple(total // rate for total in totals), size)
            self._paged[rate] = torch.tensor(written, dtype=torch.int64, device=self._device), pages
        return self._paged[rate]

    def ring(self, kept: int, size: int) -> "_Ring":
        """Rings of `size` rows of which `kept`, the newest included, are read."""
        if (kept, size) not in self._rings:
            self._rings[kept, size] = _Ring(self._pasts, self._counts, self._states, kept, size, self._device)
        return self._rings[kept, size]


class _Ring:
    """Rows of rings: the row of position p lies at p modulo the ring's size."""

    def __init__(
        self,
        pasts: tuple[int, ...],
        counts: tuple[int, ...],
        states: tuple[int, ...],
        kept: int,
        size: int,
        device: torch.device,
    ):
        old: list[int] = []
        source: list[int] = []
        target: list[int] = []
        order: list[int] = []
        firsts = [max(past - kept + 1, 0) for past in pasts]
        num_old = sum(past - first for past, first in zip(pasts, firsts, strict=True))
        token = 0
        for past, count, state, first in zip(pasts, counts, states, firsts, strict=True):
            order.extend(range(len(old), len(old) + past - first))
            order.extend(range(num_old + token, num_old + token + count))
            old.extend(state * size + position % size for position in range(first, past))
            stored = range(max(past + count - size, past), past + count)
            source.extend(position - past + token for position in stored)
            target.extend(state * size + position % size for position in stored)
            token += count
        lengths = (past - first + count for past, count, first in zip(pasts, counts, firsts, strict=True))
        self.starts = tuple(accumulate(lengths, initial=0))
        self._old, self._source, self._target, self._order = (
            torch.tensor(rows, dtype=torch.int64, device=device) for rows in (old, source, target, order)
        )
        self._stores_all = len(source) == token
        self._in_order = len(pasts) == 1

    def extend(self, pool: Tensor, rows: Tensor) -> FlatRows:
        """Reads what precedes this batch, then stores the batch's rows over what is no longer needed."""
        flat = pool.flatten(0, 1)
        together = torch.cat((flat[self._old], rows))
        if not self._in_order:
            together = together[self._order]
        flat.index_copy_(0, self._target, rows if self._stores_all else rows[self._source])
        return FlatRows(together, self.starts)
