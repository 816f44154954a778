"""Means with 95 % intervals, by drawing items again and again (the bootstrap of percentiles).

What is drawn are items: an interval says how far the mean would move with other items of the same kind, and nothing of
other prompts or other training runs. Differences of two models are differences item by item, which leaves out what is
hard for both. The same seed draws the same. Knows numbers alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4000
_AT_ONCE = 2**22  # draws
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and the bounds between which 95 of 100 redrawn means lie."""

    value: float
    low: float
    high: float


def estimate(*groups: Sequence[float] | NDArray[np.float64], seed: int = 0, rounds: int = ROUNDS) -> Estimate:
    """The mean of the groups' means, each group drawn for itself: of one group, its mean. No group may be empty."""
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    generator = np.random.default_rng(seed)
    drawn = np.mean([_redrawn(group, generator, rounds) for group in values], axis=0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value=float(np.mean([group.mean() for group in values])), low=float(low), high=float(high))


def ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0, rounds: int = ROUNDS) -> Estimate | None:
    """The ratio of two sums over the same items, which are drawn together. None for fewer than two items, which tell
    nothing of how items differ, and where `below` adds up to nothing.
    """
    pairs = np.array([above, below], dtype=np.float64)
    if pairs.shape[1] < 2 or pairs[1].sum() <= 0:
        return None
    generator, size = np.random.default_rng(seed), pairs.shape[1]
    drawn = []
    for done in range(0, rounds, step := max(1, _AT_ONCE // size)):
        sums = pairs[:, generator.integers(size, size=(min(step, rounds - done), size))].sum(axis=2)
        drawn.append(sums[0] / np.maximum(sums[1], np.finfo(np.float64).tiny))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return Estimate(value=float(pairs[0].sum() / pairs[1].sum()), low=float(low), high=float(high))


def share(hits: int, of: int) -> Estimate:
    """A share of items with Wilson's interval (1927), which says also of none and of all how little they may prove."""
    value, spread = hits / of, _NORMAL_95**2 / of
    middle = (value + spread / 2) / (1 + spread)
    half = _NORMAL_95 * math.sqrt(value * (1 - value) / of + spread / (4 * of)) / (1 + spread)
    return Estimate(value=value, low=min(max(middle - half, 0.0), value), high=max(min(middle + half, 1.0), value))


def _redrawn(values: NDArray[np.float64], generator: np.random.Generator, rounds: int) -> NDArray[np.float64]:
    """`rounds` means of as many values as there are, drawn with replacement."""
    size = len(values)
    means = []
    for done in range(0, rounds, step := max(1, _AT_ONCE // size)):
        means.append(values[generator.integers(size, size=(min(step, rounds - done), size))].mean(axis=1))
    return np.concatenate(means)
