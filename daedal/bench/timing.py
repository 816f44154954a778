"""How long something takes: repeats, their median, and how far they lie apart.

The spread is what tells a quiet machine from a busy one, so it is kept with every figure. Knows nothing of what runs.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]
Call = Callable[[], object]
MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Repeats of one thing, in seconds, in the order in which they ran."""

    seconds: Sequence[float]

    def __post_init__(self) -> None:
        assert self.seconds
        assert all(one > 0 for one in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the repeats lie within so large a part of the median; 0 where there is one repeat."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def repeated(
    call: Call, *, clock: Clock, seconds: float, least: int = 5, most: int = MOST, warm: bool = True
) -> Timing:
    """Calls until `seconds` are spent, from `least` to `most` times. warm: one call before, not counted."""

    def once() -> int:
        call()
        return 1

    return shared(once, clock=clock, seconds=seconds, least=least, most=most, warm=warm)


def shared(
    call: Callable[[], int], *, clock: Clock, seconds: float, least: int = 5, most: int = MOST, warm: bool = True
) -> Timing:
    """`repeated` of a thing that a call does as many times as it returns, each of which took as long as the others."""
    if warm:
        call()
    found: list[float] = []
    while len(found) < least or (sum(found) < seconds and len(found) < most):
        started = clock()
        count = call()
        found += [max(clock() - started, 1e-9) / count] * count
    return Timing(seconds=found)
