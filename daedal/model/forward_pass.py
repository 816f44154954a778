"""What all layers of one forward pass share, worked out once: the batch, the cache, angles, and which groups of tokens
are complete.

Layers own no serving state; whatever depends on positions alone belongs here. Host integers become index tensors once
per step, so that no layer asks the device for a length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from daedal.config import ModelConfig
from daedal.model.batch import CacheView, RaggedBatch, Uncached
from daedal.model.rotary import angles

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The groups of `rate` tokens that a batch completes, N of them, sequence after sequence.

    places_Nr: for each token of a group its row among the rows that a ring slot gives back. before_Nr: the same for the
    group before it; of a sequence's first group, that group's own rows. is_first_N: which these are. turn: angles of
    each group's first position.
    """

    places_Nr: Tensor
    before_Nr: Tensor
    is_first_N: Tensor
    turn: Turn


class ForwardPass:
    """One forward pass of `batch`; without a cache its sequences are whole."""

    def __init__(self, config: ModelConfig, batch: RaggedBatch, cache: CacheView | None):
        self.batch = batch
        self.cache = Uncached(batch) if cache is None else cache
        self._config = config
        self._turns: dict[bool, Turn] = {}
        self._groups: dict[tuple[int, int], Groups] = {}

    def turn(self, *, compressed: bool = False) -> Turn:
        """cos_TC and sin_TC of the tokens' positions; compressed: for V4's layers with entries."""
        if compressed not in self._turns:
            self._turns[compressed] = self._angles(self.batch.positions_T, compressed)
        return self._turns[compressed]

    def groups(self, rate: int, kept: int) -> Groups:
        """The complete groups of `rate` tokens, among rows of a ring that keeps `kept`, the newest included."""
        if (rate, kept) not in self._groups:
            self._groups[rate, kept] = self._find_groups(rate, kept)
        return self._groups[rate, kept]

    def _find_groups(self, rate: int, kept: int) -> Groups:
        none = torch.arange(0)  # a batch may have no sequence
        places, before, first, positions = [none], [none], [none == 0], [none]
        base = 0
        for past, count in zip(self.batch.pasts, self.batch.counts, strict=True):
            num_old = min(past, kept - 1)
            starts_N = torch.arange(past // rate, (past + count) // rate) * rate
            places.append(base + starts_N - (past - num_old))
            before.append(places[-1] - torch.where(starts_N > 0, rate, 0))
            first.append(starts_N == 0)
            positions.append(starts_N)
            base += num_old + count
        device = self.batch.positions_T.device
        offsets_r = torch.arange(rate)
        return Groups(
            places_Nr=(torch.cat(places)[:, None] + offsets_r).to(device),
            before_Nr=(torch.cat(before)[:, None] + offsets_r).to(device),
            is_first_N=torch.cat(first).to(device),
            turn=self._angles(torch.cat(positions).to(device), True),
        )

    def _angles(self, positions_T: Tensor, compressed: bool) -> Turn:
        rope = self._config.compress_rope_parameters if compressed else self._config.rope_parameters
        assert rope is not None
        return angles(rope, self._config.rope_dim, positions_T)
