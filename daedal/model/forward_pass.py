"""What all layers of one forward pass share, worked out once: the batch, the cache, angles, and which groups of tokens
are complete; and in training, who watches.

Layers own no serving state; whatever depends on positions alone belongs here. Host integers become index tensors once
per step, so that no layer asks the device for a length. What layers show to an `Observer` is theirs anyway: watching
changes nothing of what they compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.batch import CacheView, RaggedBatch, Uncached
from daedal.model.rotary import angles
from daedal.ops.rings import RingRows
from daedal.ops.rows import Rows

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """One layer's routing: logits_TE float32, with gradients, and the chosen ids_TA. scoring: as in `ops.route`."""

    layer: int
    batch: RaggedBatch
    logits_TE: Tensor
    ids_TA: Tensor
    scoring: str
    hashed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Indexed:
    """How one layer's indexer scores entries, with gradients of the indexer's own parameters.

    The score of entry s is the sum over index heads of weights[t, i] * relu(q[t, i] . k[s]), as in
    `ops.choose_entries`. rate: tokens of an entry.
    """

    layer: int
    q_TIK: Tensor
    weights_TI: Tensor
    keys: Rows
    rate: int

    def choose(self, batch: RaggedBatch, count: int) -> Tensor:
        """chosen_TA, the best `count` entries for each query."""
        return ops.choose_entries(
            self.q_TIK, self.weights_TI, batch.starts, batch.pasts, self.keys, count=count, rate=self.rate
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Attended:
    """What the attention of the same layer reads, as `ops.sparse_attention` takes it: the indexer's example."""

    layer: int
    batch: RaggedBatch
    q_THK: Tensor
    entries: Rows
    chosen_TA: Tensor | None
    window: Rows | RingRows | None
    sinks_H: Tensor | None
    scale: float
    rate: int
    span: int


class Observer(Protocol):
    """Who watches a forward pass. Where activations are computed again for the backward pass, layers show everything
    again, with `again`: sums and counts must be left alone then, but the same tensors be computed.

    reads_all: attention reads every entry, whatever the indexers choose, as before they are trained.
    """

    @property
    def reads_all(self) -> bool: ...

    def routed(self, seen: Routed, *, again: bool) -> None: ...

    def indexed(self, seen: Indexed, attended: Attended, *, again: bool) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The complete groups of `rate` tokens of whole sequences, N of them, sequence after sequence.

    places_Nr: each group's tokens, in T. before_Nr: those of the group before it; of a sequence's first group, its own.
    is_first_N: which these are. turn: angles of each group's first position. starts: the sequences' boundaries in N.
    """

    places_Nr: Tensor
    before_Nr: Tensor
    is_first_N: Tensor
    turn: Turn
    starts: tuple[int, ...]


class ForwardPass:
    """One forward pass of `batch`; without a cache its sequences are whole. observer: who watches it."""

    def __init__(
        self, config: ModelConfig, batch: RaggedBatch, cache: CacheView | None, observer: Observer | None = None
    ):
        self.batch = batch
        self.cache = Uncached(batch) if cache is None else cache
        self.observer = observer
        self.again = False
        self._config = config
        self._turns: dict[tuple[bool, int], Turn] = {}
        self._groups: dict[int, Groups] = {}

    @property
    def reads_all(self) -> bool:
        """Whether attention is to read every entry, whatever indexers choose."""
        return self.observer is not None and self.observer.reads_all

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """While layers compute once more what they have computed already."""
        self.again = True
        try:
            yield
        finally:
            self.again = False

    def turn(self, *, compressed: bool = False, rate: int = 1) -> Turn:
        """cos_TC and sin_TC of the tokens' positions. compressed: for V4's layers with entries. rate: of the first
        position of each token's own group of so many tokens.
        """
        if (compressed, rate) not in self._turns:
            positions_T = self.batch.positions_T if rate == 1 else self.batch.group_starts(rate)
            self._turns[compressed, rate] = self._angles(positions_T, compressed)
        return self._turns[compressed, rate]

    def groups(self, rate: int) -> Groups:
        """The complete groups of `rate` tokens; for whole sequences, which have no past."""
        if rate not in self._groups:
            self._groups[rate] = self._find_groups(rate)
        return self._groups[rate]

    def _find_groups(self, rate: int) -> Groups:
        device = self.batch.positions_T.device
        spans = [range(start, end - rate + 1, rate) for start, end in pairwise(self.batch.starts)]
        starts_N = torch.tensor([start for span in spans for start in span], dtype=torch.int64, device=device)
        offsets_r = torch.arange(rate, device=device)
        positions_N = self.batch.positions_T[starts_N]
        before_N = starts_N - torch.where(positions_N > 0, rate, 0)
        return Groups(
            places_Nr=starts_N[:, None] + offsets_r,
            before_Nr=before_N[:, None] + offsets_r,
            is_first_N=positions_N == 0,
            turn=self._angles(positions_N, True),
            starts=tuple(accumulate(map(len, spans), initial=0)),
        )

    def _angles(self, positions_T: Tensor, compressed: bool) -> Turn:
        rope = self._config.compress_rope_parameters if compressed else self._config.rope_parameters
        assert rope is not None
        return angles(rope, self._config.rope_dim, positions_T)
