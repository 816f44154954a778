"""Rows of a ragged batch: for every sequence, the keys or values (or latents) of all its tokens so far.

Attention reads them through `sequence(i)` and does not care whether they lie side by side, as in training, or on the
pages of a cache, as in serving. Kernels that walk pages themselves take `PagedRows` apart. Knows nothing of models,
layers or schedulers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.packed_rows import PackedRows


@dataclass(frozen=True, eq=False)
class FlatRows:
    """`rows`: [S, ...], sequences one after the other; `starts`: B + 1 boundaries in it."""

    rows: Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in pairwise(self.starts))

    def sequence(self, index: int) -> Tensor:
        """[S_i, ...]: a view."""
        return self.rows[self.starts[index] : self.starts[index + 1]]

    def take(self, index: int, chosen: Tensor) -> Tensor:
        """[*chosen, ...]: a copy of some rows of a sequence, by their place in it."""
        return self.sequence(index)[chosen]

    def select(self, indices: Sequence[int]) -> "FlatRows":
        """The rows of some sequences, side by side."""
        return _side_by_side([self.sequence(index) for index in indices])

    def flatten(self) -> "FlatRows":
        return self


@dataclass(frozen=True, eq=False)
class Pages:
    """Where sequences lie in every pool of a cache: one object for all layers of a step, so that what follows from it
    is worked out once.

    tables: per sequence its pages in order. lengths: its rows. page_size: rows of a page.
    """

    tables: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    page_size: int

    def select(self, indices: Sequence[int]) -> "Pages":
        """Some of the sequences."""
        tables = tuple(self.tables[index] for index in indices)
        return Pages(tables, tuple(self.lengths[index] for index in indices), self.page_size)

    def used(self, index: int) -> tuple[int, ...]:
        """The pages of a sequence that hold tokens."""
        return self.tables[index][: -(-self.lengths[index] // self.page_size)]

    @cached_property
    def table_BP(self) -> Tensor:
        """int32: each sequence's pages, padded with 0; what kernels that walk pages themselves read."""
        table_BP = torch.zeros((len(self.tables), max(map(len, self.tables), default=0)), dtype=torch.int32)
        for row, table in enumerate(self.tables):
            table_BP[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        return table_BP

    @cached_property
    def lengths_B(self) -> Tensor:
        """int32: each sequence's rows."""
        return torch.tensor(self.lengths, dtype=torch.int32)

    @cached_property
    def positions(self) -> tuple[Tensor, ...]:
        """Per sequence, for each of its rows the row of a pool, int64."""
        offsets_N = torch.arange(self.page_size)
        rows = []
        for index, length in enumerate(self.lengths):
            pages_P = torch.tensor(self.used(index), dtype=torch.int64)
            rows.append((pages_P.unsqueeze(-1) * self.page_size + offsets_N).flatten()[:length])
        return tuple(rows)

    @cached_property
    def first_pages(self) -> tuple[int | None, ...]:
        """Per sequence its first page, where its pages follow one another in the pool; else None."""
        firsts: list[int | None] = []
        for index in range(len(self.lengths)):
            used = self.used(index)
            first = used[0] if used else 0
            firsts.append(first if used == tuple(range(first, first + len(used))) else None)
        return tuple(firsts)

    @cached_property
    def rectangle(self) -> tuple[Tensor, Tensor]:
        """(index_BS, hidden_BS): for each place of a rectangle as long as the longest sequence, the row of a pool to
        read, and whether it is padding. Padding repeats a sequence's first row, so that it reads nothing unwritten.
        """
        index_BS = torch.empty((len(self.lengths), max(self.lengths)), dtype=torch.int64)
        hidden_BS = torch.zeros_like(index_BS, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            rows_S = self.positions[row]
            index_BS[row, :length] = rows_S
            index_BS[row, length:] = rows_S[0]
            hidden_BS[row, length:] = True
        return index_BS, hidden_BS


class Unrecordable(Exception):
    """A forward pass cannot be recorded for later steps; the message names what stands in the way."""


class MovingPages(Pages):
    """Pages of a recorded step, which kernels read from tensors that are filled anew for every step.

    table_BP: int32, wide enough for any later step. What would be known on the host of one step alone is refused.
    """

    def __init__(self, table_BP: Tensor, lengths_B: Tensor, page_size: int):
        fixed = {"table_BP": table_BP, "lengths_B": lengths_B, "page_size": page_size}
        self.__dict__.update(fixed)

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        raise Unrecordable("page tables are read on the host")

    @property
    def lengths(self) -> tuple[int, ...]:
        raise Unrecordable("lengths are read on the host")


@dataclass(frozen=True, eq=False)
class PagedRows:
    """`pool`: [P, N, ...], P pages of N tokens, and where its sequences lie.

    packing: the pool holds bytes, [P, N, packing.nbytes]; all that is read here comes back as numbers.
    """

    pool: Tensor
    pages: Pages
    packing: PackedRows | None = None

    def __len__(self) -> int:
        return self.pages.lengths_B.shape[0]

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.pages.lengths

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.pool.dtype if self.packing is None else self.packing.dtype

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row's numbers."""
        return tuple(self.pool.shape[2:]) if self.packing is None else (self.packing.dim,)

    def sequence(self, index: int) -> Tensor:
        """[S_i, ...]: a view where the pages follow one another in the pool, else a gathered copy."""
        used, first = self.pages.used(index), self.pages.first_pages[index]
        if first is None:
            held = self.pool.index_select(0, _used(self.pages, self.pool.device)[index])
        else:
            held = self.pool[first : first + len(used)]
        return self._numbers(held.flatten(0, 1)[: self.lengths[index]])

    def take(self, index: int, chosen: Tensor) -> Tensor:
        """[*chosen, ...]: a copy of some rows of a sequence, by their place in it; no other row is read."""
        first = self.pages.first_pages[index]
        if first is not None:
            return self._numbers(self.pool.flatten(0, 1)[first * self.pages.page_size + chosen])
        rows_S = _positions(self.pages, self.pool.device)[index]
        return self._numbers(self.pool.flatten(0, 1)[rows_S[chosen]])

    def select(self, indices: Sequence[int]) -> "PagedRows":
        """Some sequences of the same pool."""
        return PagedRows(self.pool, self.pages.select(indices), self.packing)

    def flatten(self) -> FlatRows:
        """The rows of all sequences side by side; a copy unless there is one sequence and it lies contiguous."""
        return _side_by_side([self.sequence(index) for index in range(len(self))])

    def padded(self) -> tuple[Tensor, Tensor]:
        """(rows [B, S, ...], hidden_BS): a copy of all rows, short sequences padded to the longest."""
        index_BS, hidden_BS = _rectangle(self.pages, self.pool.device)
        return self._numbers(self.pool.flatten(0, 1)[index_BS]), hidden_BS

    def held(self, rows: Tensor) -> Tensor:
        """Rows [N, ...] as the pool holds them."""
        return rows.to(self.pool.dtype) if self.packing is None else self.packing.pack(rows)

    def _numbers(self, held: Tensor) -> Tensor:
        return held if self.packing is None else self.packing.unpack(held)


Rows = FlatRows | PagedRows


def staying(
    starts: Sequence[int], pasts: Sequence[int], states: Sequence[int], size: int
) -> Iterator[tuple[int, int, int]]:
    """Which tokens of a ragged batch are kept in rings of `size` rows, the last ones of each sequence: number in the
    batch, position in the sequence, and ring, of each.
    """
    for (start, end), past, state in zip(pairwise(starts), pasts, states, strict=True):
        for token in range(max(end - size, start), end):
            yield token, past + token - start, state


def _side_by_side(parts: list[Tensor]) -> FlatRows:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    return FlatRows(parts[0] if len(parts) == 1 else torch.cat(parts), tuple(starts))


# What follows from a step's pages, on the device where its rows lie: copied once for all layers.


@lru_cache(maxsize=8)
def page_table(pages: Pages, device: torch.device) -> Tensor:
    """`Pages.table_BP`."""
    return pages.table_BP.to(device)


@lru_cache(maxsize=8)
def _used(pages: Pages, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(pages.used(index), device=device) for index in range(len(pages.lengths)))


@lru_cache(maxsize=8)
def _positions(pages: Pages, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(rows_S.to(device) for rows_S in pages.positions)


@lru_cache(maxsize=8)
def _rectangle(pages: Pages, device: torch.device) -> tuple[Tensor, Tensor]:
    index_BS, hidden_BS = pages.rectangle
    return index_BS.to(device), hidden_BS.to(device)
