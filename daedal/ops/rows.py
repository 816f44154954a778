"""Rows of a ragged batch: for every sequence, the keys or values (or latents) of all its tokens so far.

Attention reads them through `sequence(i)` and does not care whether they lie side by side, as in training, or on the
pages of a cache, as in serving. Kernels that walk pages themselves take `PagedRows` apart. Knows nothing of models,
layers or schedulers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


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

    def select(self, indices: Sequence[int]) -> "FlatRows":
        """The rows of some sequences, side by side."""
        return _side_by_side([self.sequence(index) for index in indices])

    def flatten(self) -> "FlatRows":
        return self


@dataclass(frozen=True, eq=False)
class PagedRows:
    """`pool`: [P, N, ...], P pages of N tokens; `tables`: per sequence its pages in order; `lengths`: its tokens."""

    pool: Tensor
    tables: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> Tensor:
        """[S_i, ...]: a view where the pages follow one another in the pool, else a gathered copy."""
        length = self.lengths[index]
        num_pages = -(-length // self.pool.shape[1])
        table = self.tables[index][:num_pages]
        first = table[0] if table else 0
        if table == tuple(range(first, first + num_pages)):
            pages = self.pool[first : first + num_pages]
        else:
            pages = self.pool.index_select(0, torch.tensor(table, device=self.pool.device))
        return pages.flatten(0, 1)[:length]

    def select(self, indices: Sequence[int]) -> "PagedRows":
        """Some sequences of the same pool."""
        return PagedRows(
            self.pool, tuple(self.tables[index] for index in indices), tuple(self.lengths[index] for index in indices)
        )

    def flatten(self) -> FlatRows:
        """The rows of all sequences side by side; a copy unless there is one sequence and it lies contiguous."""
        return _side_by_side([self.sequence(index) for index in range(len(self))])


Rows = FlatRows | PagedRows


def _side_by_side(parts: list[Tensor]) -> FlatRows:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    return FlatRows(parts[0] if len(parts) == 1 else torch.cat(parts), tuple(starts))
