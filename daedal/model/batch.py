"""What one forward pass is given: a flat batch of tokens, and a view of the cache to read and extend.

Training and serving share this one form. Tokens of all sequences lie one after the other (`T`); a sequence may bring
its whole prompt, a chunk of it, or one token, side by side in one batch. Boundaries are Python integers, so that no
layer ever asks the device for a length. Paging is hidden behind `CacheView`; layers own no serving state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class RaggedBatch:
    """Tokens of B sequences.

    ids_T: int64, token ids. positions_T: int64, each token's position in its own sequence.
    starts: B + 1 boundaries in T. pasts: per sequence, the tokens that the cache holds already.
    """

    ids_T: Tensor
    positions_T: Tensor
    starts: tuple[int, ...]
    pasts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        pasts: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> "RaggedBatch":
        """A batch from lists of ids; `pasts[i]` tokens of sequence i are in the cache and not repeated here."""
        pasts = tuple(pasts) if pasts is not None else (0,) * len(sequences)
        starts = [0]
        positions: list[int] = []
        for ids, past in zip(sequences, pasts, strict=True):
            starts.append(starts[-1] + len(ids))
            positions.extend(range(past, past + len(ids)))
        flat = [token for ids in sequences for token in ids]
        return cls(
            ids_T=torch.tensor(flat, dtype=torch.int64, device=device),
            positions_T=torch.tensor(positions, dtype=torch.int64, device=device),
            starts=tuple(starts),
            pasts=pasts,
        )

    @classmethod
    def rectangular(cls, ids_BT: Tensor) -> "RaggedBatch":
        """A batch of B whole sequences of equal length, nothing cached."""
        num_sequences, length = ids_BT.shape
        positions_T = torch.arange(length, device=ids_BT.device).repeat(num_sequences)
        starts = tuple(range(0, num_sequences * length + 1, length)) if length else (0,) * (num_sequences + 1)
        return cls(ids_T=ids_BT.reshape(-1), positions_T=positions_T, starts=starts, pasts=(0,) * num_sequences)

    def __len__(self) -> int:
        return len(self.pasts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that each sequence brings."""
        return tuple(end - start for start, end in pairwise(self.starts))

    def group_starts(self, rate: int) -> Tensor:
        """int64: for each token the first position of its own group of `rate` tokens."""
        return self.positions_T - self.positions_T % rate


@dataclass(frozen=True, eq=False)
class GroupRows:
    """Where a compressor keeps what it makes of groups of tokens, as `ops.pool_groups` takes it.

    ring: [states, N, 2, W], rows of the last tokens; states: each sequence's ring. entries: one row for each group,
    those that this batch completes included; these are not written yet.
    """

    ring: Tensor
    states: tuple[int, ...]
    entries: PagedRows


class CacheView(Protocol):
    """The cache as one forward pass sees it: the sequences of its batch, in the batch's order."""

    def extend(self, layer: int, **slots: Tensor) -> Mapping[str, Rows]:
        """Stores a row for each token, [T, *slot shape], under the slot names of `shapes.cache`, and gives back all
        rows of those slots so far, these included.
        """

    def recent(self, layer: int, name: str, rows: Tensor) -> FlatRows | RingRows:
        """The same for a slot of which only the last n rows are ever read: back come its last n - 1 from before this
        batch, as far as there are any, and then these.
        """

    def groups(self, layer: int, ring: str, entries: str) -> GroupRows | None:
        """Where a compressor's rows and entries go, by their slot names. None where sequences are whole: there they are
        pooled at once, and nothing is kept.
        """


class Uncached:
    """The `CacheView` of whole sequences with nothing cached, as in training: what is stored is all there is."""

    def __init__(self, batch: RaggedBatch):
        assert not any(batch.pasts)
        self._batch = batch

    def extend(self, layer: int, **slots: Tensor) -> Mapping[str, Rows]:
        return {name: FlatRows(rows, self._batch.starts) for name, rows in slots.items()}

    def recent(self, layer: int, name: str, rows: Tensor) -> FlatRows:
        return FlatRows(rows, self._batch.starts)

    def groups(self, layer: int, ring: str, entries: str) -> None:
        return None
