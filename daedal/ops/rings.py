"""Rows of which only the last few are read: a ring for each sequence, in which the row of position p lies at p modulo
the ring's size.

`RingRows` stands for them as a sequence's last rows without copying any, once the batch's own are stored. That holds as
long as a batch's tokens do not overwrite what its first one still reads: a ring of n + m rows serves readers of the
last n to batches of m + 1 tokens a sequence. `Lasting` are a step's numbers at a place where kernels read them. Knows
nothing of models, layers or schedulers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from daedal.ops.rows import FlatRows


class Lasting(tuple[int, ...]):
    """Whole numbers of a step that also lie in memory, int32: kernels read them there, so that a recorded step can be
    run again with others.
    """

    tensor: Tensor

    @classmethod
    def of(cls, values: Sequence[int]) -> "Lasting":
        numbers = cls(values)
        numbers.tensor = torch.tensor(values, dtype=torch.int32)
        return numbers


@dataclass(frozen=True, eq=False)
class RingRows:
    """`pool`: [states, N, ...]. states: each sequence's ring. totals: its tokens so far, this batch's included.
    lengths: how many of its last rows may be read.
    """

    pool: Tensor
    states: tuple[int, ...]
    totals: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.states)

    def sequence(self, index: int) -> Tensor:
        """[S_i, ...]: a copy, in order of positions."""
        total = self.totals[index]
        positions = torch.arange(total - self.lengths[index], total, device=self.pool.device)
        return self.pool[self.states[index]][positions % self.pool.shape[1]]

    def grown(self, counts: Sequence[int]) -> "RingRows":
        """The same rows and the `counts` next ones of each sequence, once they are stored."""
        totals, lengths = (
            tuple(old + count for old, count in zip(values, counts, strict=True))
            for values in (self.totals, self.lengths)
        )
        return RingRows(self.pool, self.states, totals, lengths)

    def followed_by(self, rows: Tensor, starts: Sequence[int]) -> FlatRows:
        """A copy: each sequence's rows, then its own of `rows`."""
        parts = [(self.sequence(index), rows[start:end]) for index, (start, end) in enumerate(pairwise(starts))]
        together = torch.cat([part for pair in parts for part in pair]) if parts else rows
        return FlatRows(together, tuple(accumulate((len(old) + len(new) for old, new in parts), initial=0)))

    def select(self, indices: Sequence[int]) -> "RingRows":
        """Some sequences of the same pool."""
        states, totals, lengths = (
            tuple(values[index] for index in indices) for values in (self.states, self.totals, self.lengths)
        )
        return RingRows(self.pool, states, totals, lengths)
