"""The paged cache: for every cache slot of the model a pool, and a view of it for each step.

What is kept is decided by `shapes.cache`; nothing else is allocated. Rows that stay lie on pages, as many rows to a
page as its tokens fill; rows of which only the last few are read lie in a ring, one ring for each sequence that may run
at once. Where a row lies follows from its position alone, so a cache is rewound by saying a smaller past: nothing is
undone, rows beyond are simply written again, and rings are a little longer than needed so that a few rejected tokens
cannot have overwritten what is still wanted. The pools are not cleared: rows that were never written may hold anything,
and are never read. With `kv_dtype="fp8"` what grows with the context, latents and compressed entries, is packed in
eight bits but for its rotated part (decision 016); rings and the indexer's keys stay as they are. Does not know whose
pages these are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from daedal import ops, shapes
from daedal.config import ModelConfig
from daedal.cost import cached
from daedal.infer.prefixes import Copy
from daedal.model.batch import GroupRows
from daedal.ops.packed_rows import PackedRows
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows
from daedal.shapes import Slot

REWIND = 8  # tokens that may be fed and then withdrawn

KvDtype = Literal["auto", "fp8"]  # auto: rows in the model's own dtype


def page_multiple(config: ModelConfig) -> int:
    """Tokens that every page must be a multiple of: whole rows of each slot. 1, in V4 the longest window, 128."""
    return math.lcm(*(slot.rate for slot in shapes.cache(config, drafting=True)))


def page_nbytes(
    config: ModelConfig, page_size: int, dtype: torch.dtype, *, drafting: bool = False, kv_dtype: KvDtype = "auto"
) -> int:
    """Bytes of one page of `page_size` tokens over all layers and slots, rows kept in `dtype` or as `kv_dtype` says."""
    size = partial(cached.in_eight_bits if kv_dtype == "fp8" else cached.in_numbers, dtype.itemsize)
    return cached.page_bytes(shapes.cache(config, drafting=drafting), page_size, size)


def can_pack(config: ModelConfig) -> bool:
    """Whether the model has any rows that `kv_dtype="fp8"` packs."""
    return any(slot.exact is not None for slot in shapes.cache(config))


def state_nbytes(config: ModelConfig, dtype: torch.dtype, *, drafting: bool = False) -> int:
    """Bytes of the rings of one sequence over all layers and slots, rows kept in `dtype`; 0 for most families."""
    size = partial(cached.in_numbers, dtype.itemsize)
    return cached.ring_bytes(shapes.cache(config, drafting=drafting), size, rewind=REWIND)


def _copy_pages(pool: Tensor, copy: Copy) -> None:
    if copy.overlaps:
        held = pool[list(copy.sources)]
        pool[list(copy.targets)] = held
        return
    for source, target, count in copy.runs:
        pool[target : target + count] = pool[source : source + count]


def _ring_rows(slot: Slot) -> int:
    return slot.ring + REWIND


def _kept(slot: Slot, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if slot.wide and dtype != torch.float64 else dtype


def _packing(slot: Slot, dtype: torch.dtype, kv_dtype: KvDtype) -> PackedRows | None:
    if kv_dtype == "auto" or slot.exact is None:
        return None
    (dim,) = slot.shape
    return PackedRows(dim - slot.exact, slot.exact, dtype)


class PagedCache:
    """A pool for every slot of every layer.

    Paged slots: [P, N / rate, *slot shape] for `num_pages` pages of `page_size` tokens, bytes in place of the slot's
    shape where `kv_dtype` packs them. Ring slots: [num_states, ring + REWIND, *slot shape]. drafting: also for the
    model's own drafting modules, as layers after the last.
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
        kv_dtype: KvDtype = "auto",
    ):
        assert page_size % page_multiple(config) == 0
        self.page_size = page_size
        self._device = torch.device(device)
        self._slots: dict[tuple[int, str], Slot] = {}
        self._pools: dict[int, dict[str, Tensor]] = {}
        self._packings: dict[tuple[int, str], PackedRows | None] = {}
        for slot in shapes.cache(config, drafting=drafting):
            assert slot.layer is not None
            rows = (num_states, _ring_rows(slot)) if slot.ring else (num_pages, page_size // slot.rate)
            packing = _packing(slot, dtype, kv_dtype)
            row, kept = (slot.shape, _kept(slot, dtype)) if packing is None else ((packing.nbytes,), torch.uint8)
            pool = torch.empty((*rows, *row), dtype=kept, device=device)
            self._pools.setdefault(slot.layer, {})[slot.name] = pool
            self._slots[slot.layer, slot.name] = slot
            self._packings[slot.layer, slot.name] = packing

    @property
    def pools(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Layer to slot name to pool."""
        return self._pools

    def paged(self, layer: int, name: str, pages: Pages) -> PagedRows:
        """A paged slot's rows."""
        return PagedRows(self._pools[layer][name], pages, self._packings[layer, name])

    @property
    def slots(self) -> Mapping[tuple[int, str], Slot]:
        """(layer, slot name) to slot."""
        return self._slots

    @cached_property
    def rates(self) -> frozenset[int]:
        """Tokens of one row on a page, of every slot whose rows stay."""
        return frozenset(slot.rate for slot in self._slots.values() if not slot.ring)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools.values())

    def copy(self, copy: Copy) -> None:
        """Copies rows from pages and a ring to others, in every layer."""
        for (layer, name), slot in self._slots.items():
            pool = self._pools[layer][name]
            if not slot.ring:
                _copy_pages(pool, copy)
            elif copy.ring is not None:
                source, target = copy.ring
                pool[target] = pool[source]

    @property
    def layout(self) -> list[list[object]]:
        """What is kept of a token and how, as JSON can hold it: the same for caches whose rows may be exchanged."""
        kinds = {**self.kinds(), **self.kinds(rings=True)}
        return [[name, list(shape), str(dtype)] for name, (shape, dtype) in kinds.items()]

    def kinds(self, *, rings: bool = False) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of each slot, called `layer.name`: shape and dtype of its rows on a page, or in a ring."""
        return {name: (tuple(pool.shape[1:]), pool.dtype) for name, pool in self._named(rings=rings)}

    def pages(self, pages: Sequence[int]) -> dict[str, Tensor]:
        """A copy of what lies on some pages: [pages, rows, ...] by slot."""
        return {name: pool[list(pages)].cpu() for name, pool in self._named(rings=False)}

    def ring(self, number: int) -> dict[str, Tensor]:
        """A copy of what lies in a ring: [rows, ...] by slot."""
        return {name: pool[number].clone().cpu() for name, pool in self._named(rings=True)}

    def put_pages(self, pages: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        """Puts back what `pages` gave."""
        for name, pool in self._named(rings=False):
            pool[list(pages)] = rows[name].to(pool.device)

    def put_ring(self, number: int, rows: Mapping[str, Tensor]) -> None:
        """Puts back what `ring` gave."""
        for name, pool in self._named(rings=True):
            pool[number] = rows[name].to(pool.device)

    def _named(self, *, rings: bool) -> Iterator[tuple[str, Tensor]]:
        for (layer, name), slot in self._slots.items():
            if bool(slot.ring) == rings:
                yield f"{layer}.{name}", self._pools[layer][name]

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
        size = self.page_size
        written: list[int] = []
        for table, past, count in zip(tables, pasts, counts, strict=True):
            assert past + count <= len(table) * size
            written.extend(table[place // size] * size + place % size for place in range(past, past + count))
        totals = [past + count for past, count in zip(pasts, counts, strict=True)]
        fixed = tuple(tuple(table) for table in tables)
        places = Places(
            starts=tuple(accumulate(counts, initial=0)),
            pasts=tuple(pasts),
            states=tuple(range(len(tables)) if states is None else states),
            written_T=torch.tensor(written, dtype=torch.int64, device=self._device),
            pages={rate: Pages(fixed, tuple(total // rate for total in totals), size // rate) for rate in self.rates},
        )
        return PagedView(cache=self, places=places)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where a step's rows lie, worked out once for all layers.

    starts: the batch's boundaries. pasts, states: each sequence's tokens so far, and its ring. written_T: int64, where
    each token's row goes among those of a pool, flattened. pages: by the tokens of a row, where all rows lie, those of
    this batch included.
    """

    starts: tuple[int, ...]
    pasts: tuple[int, ...]
    states: tuple[int, ...]
    written_T: Tensor
    pages: Mapping[int, Pages]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that each sequence brings."""
        return tuple(end - start for start, end in pairwise(self.starts))


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedView:
    """One step's `CacheView`; rows are kept in the pools' dtype, or packed. Raises ValueError for slots that the layer
    lacks.
    """

    cache: PagedCache
    places: Places

    def extend(self, layer: int, **slots: Tensor) -> Mapping[str, Rows]:
        return {name: self._extend(layer, name, rows) for name, rows in slots.items()}

    def _extend(self, layer: int, name: str, rows: Tensor) -> PagedRows:
        self._check(layer, name, "a row for each token")
        kept = self.cache.paged(layer, name, self.places.pages[1])
        ops.keep_on_pages(rows.to(kept.dtype), self.places.written_T, kept)
        return kept

    def recent(self, layer: int, name: str, rows: Tensor) -> FlatRows | RingRows:
        slot = self._check(layer, name, "the last rows")
        pool, places = self.cache.pools[layer][name], self.places
        rows, counts = rows.to(pool.dtype), places.counts
        before = RingRows(pool, places.states, places.pasts, tuple(min(past, slot.ring - 1) for past in places.pasts))
        # Few enough new rows leave those that are still read where they lie; more would overwrite them.
        fits = slot.ring - 1 + max(counts, default=0) <= pool.shape[1]
        together = before.grown(counts) if fits else before.followed_by(rows, places.starts)
        ops.keep_in_ring(rows, places.starts, places.pasts, pool, places.states)
        return together

    def groups(self, layer: int, ring: str, entries: str) -> GroupRows:
        self._check(layer, ring, "the last rows")
        slot = self._check(layer, entries, "a row for each group")
        kept = self.cache.paged(layer, entries, self.places.pages[slot.rate])
        return GroupRows(self.cache.pools[layer][ring], self.places.states, kept)

    def _check(self, layer: int, name: str, kind: str) -> Slot:
        slot = self.cache.slots.get((layer, name))
        if slot is None or _kind(slot) != kind:
            slots = (known for known in self.cache.slots.values() if known.layer == layer)
            kept = sorted(f"{known.name} ({_kind(known)})" for known in slots)
            raise ValueError(f"layer {layer} stores {kind} as {name!r}: the cache keeps {', '.join(kept)}")
        return slot


def _kind(slot: Slot) -> str:
    if slot.ring:
        return "the last rows"
    return "a row for each token" if slot.rate == 1 else "a row for each group"
