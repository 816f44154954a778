"""Sums over units of work, of all that there are and of units drawn again and again: the bootstrap behind intervals.

Units are drawn with replacement within their group, so that every round has as many of each task as the whole. The same
groups draw the same units, so models that were asked the same are redrawn together, and their ratios are paired. Knows
numbers alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 1000
SEED = 0
_AT_ONCE = 2**22  # counts of units

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and the bounds between which 95 of 100 redrawn ones lie. value: None where there is none, low and high:
    None where there is no bound; then `why` says so in a sentence.
    """

    value: float | None
    low: float | None
    high: float | None
    why: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """One quantity: over all units, and in each round."""

    whole: float
    rounds: Values


def redraw(groups: Sequence[str], values: Sequence[Sequence[float]]) -> list[Sums]:
    """The sums of each row of `values`, one number a unit. groups: of each unit."""
    columns = np.asarray(values, dtype=np.float64).T
    generator = np.random.default_rng(SEED)
    order = np.argsort(np.asarray(groups), kind="stable")
    sizes = [count for _, count in sorted(Counter(groups).items())]
    rows, parts = columns[order], []
    step = max(1, _AT_ONCE // max(len(groups), 1))
    for done in range(0, ROUNDS, step):
        rounds = min(step, ROUNDS - done)
        counts = [generator.multinomial(size, np.full(size, 1 / size), size=rounds) for size in sizes]
        parts.append(np.concatenate(counts, axis=1).astype(np.float64) @ rows)
    drawn = np.concatenate(parts)
    return [Sums(whole=float(columns[:, place].sum()), rounds=drawn[:, place]) for place in range(columns.shape[1])]


def ratio(above: Sums, below: Sums, *, units: int) -> Figure:
    """The ratio of two sums, `below` above 0 in all rounds. units: that were drawn; one alone tells no interval."""
    value = above.whole / below.whole
    if units < 2:
        return Figure(value=value, low=None, high=None, why="one unit of work tells no interval")
    low, high = np.quantile(above.rounds / below.rounds, (0.025, 0.975))
    return Figure(value=value, low=float(low), high=float(high))


def price(cost: Sums, gain: Sums, *, units: int) -> Figure:
    """Cost over a gain above 0. Rounds that gained nothing have no price, which leaves no upper bound."""
    value = cost.whole / gain.whole
    if units < 2:
        return Figure(value=value, low=None, high=None, why="one unit of work tells no interval")
    gained = gain.rounds > 0
    prices = np.full(len(gain.rounds), np.inf)
    prices[gained] = cost.rounds[gained] / gain.rounds[gained]
    low, high = np.quantile(prices, (0.025, 0.975), method="nearest")
    if np.isfinite(high):
        return Figure(value=value, low=float(low), high=float(high))
    return Figure(value=value, low=float(low), high=None, why="so few gains that other items might have brought none")
