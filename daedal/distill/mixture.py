"""Which samples a step reads: windows of several sources of text in fixed shares, a pure function of seed and number.

Every source is cut once into windows that never change; an epoch is an order of them. So what a teacher said of a
window can be kept, whatever the seed and however often it is read. Sources take turns in blocks that hold each source's
share exactly, and a small source begins its next epoch while a large one is still in its first: a step of few windows
is mixed from different sources, which matters more than their length. Knows no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from daedal.distill.lessons import Sample
from daedal.errors import ConfigError
from daedal.train.dataset import Dataset
from daedal.train.sampling import Sampler, shuffled

BLOCK = 100
"""Samples in which each source has its share: shares are whole hundredths."""

_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


class Source(Protocol):
    """So many samples, numbered from 0."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


class Windows:
    """Text, cut into windows of `context` places in the order in which it lies. name: of the text, for keys."""

    def __init__(self, dataset: Dataset, *, name: str, context: int, share: float, teacher: str | None):
        self.dataset, self.name = dataset, name
        self.share, self.teacher = share, teacher
        self._sampler = Sampler(dataset, context=context, epochs=1, shuffle=False)

    def __len__(self) -> int:
        count = self._sampler.num_samples
        assert count is not None
        return count

    def sample(self, index: int) -> Sample:
        pieces = self._sampler.sample(index)
        read = tuple(self.dataset.read(piece.document, piece.start, piece.length + 1) for piece in pieces)
        return Sample(pieces=read, share=self.share, teacher=self.teacher, key=f"{self.name}.{index}")


@dataclass(frozen=True)
class Turns:
    """Several sources as one, each in its turn, for as long as all of them have a sample."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return len(self.sources) * min(len(source) for source in self.sources)

    def sample(self, index: int) -> Sample:
        row, number = divmod(index, len(self.sources))
        return self.sources[number].sample(row)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Sources and how many of every `BLOCK` samples come from each; a source repeats, in a new order, when it ends.

    ConfigError where the shares do not add up to a block, or a source has no sample.
    """

    sources: tuple[Source, ...]
    shares: tuple[int, ...]
    seed: int = 0
    _orders: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.shares) or sum(self.shares) != BLOCK or min(self.shares, default=0) < 0:
            raise ConfigError(f"shares are {self.shares}: give one for each source, {BLOCK} in all")
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            if share and not len(source):
                raise ConfigError(f"source {number} of the mixture has no sample: give it more text, or no share")

    def sample(self, index: int) -> Sample:
        """Sample `index` of an endless row."""
        block, place = divmod(index, BLOCK)
        slot = int(shuffled(BLOCK, key=_key(self.seed, block, 0))[place])
        number = int(np.searchsorted(self._ends, slot, side="right"))
        within = slot - (int(self._ends[number - 1]) if number else 0)
        source = self.sources[number]
        epoch, row = divmod(block * self.shares[number] + within, len(source))
        return source.sample(int(self._order(number, epoch, len(source))[row]))

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.shares)

    def _order(self, number: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
        if (number, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == number and key[1] < epoch - 1]:
                del self._orders[old]
            self._orders[number, epoch] = shuffled(count, key=_key(self.seed, epoch, number + 1))
        return self._orders[number, epoch]


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """A block dealt out by weights, in whole numbers that add up to it. ConfigError where one would get nothing."""
    total = sum(weights)
    ends = [round(BLOCK * end / total) for end in accumulate(weights, initial=0.0)]
    shares = tuple(end - start for start, end in pairwise(ends))
    for weight, share in zip(weights, shares, strict=True):
        if weight > 0 and not share:
            raise ConfigError(
                f"a source of samples has the share {weight / total:.2g}, less than a hundredth: give it more, or put "
                "sources into one file"
            )
    return shares


def _key(*numbers: int) -> int:
    """64 bits that all of the numbers decide."""
    key = 0
    for number, prime in zip(numbers, _PRIMES, strict=True):
        key = ((key ^ (number + 1)) * prime + (key >> 29)) % 2**64
    return key
