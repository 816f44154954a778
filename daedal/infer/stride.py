"""How many tokens answers gain in one step where nobody waits: as many as fit a time that nobody notices.

A pass of the model sweeps the processor's caches, so whatever runs between two passes finds them cold: what takes 35
microseconds over and over takes 240 between passes. So a step of answers alone makes several passes, with nothing but
the choice of tokens between them, and is scheduled, counted and told of once. Tokens are those of single passes. Knows
seconds and requests under way: no scheduling, no clock.
"""

import math
from collections.abc import Callable, Sequence

from daedal.errors import ConfigError
from daedal.infer.live import Live
from daedal.infer.runner import Runner
from daedal.infer.sampling import choose

USUAL_MS = 25.0
_MOST = 2**16  # passes; pages have far fewer tokens
_NEWEST = 0.25  # the weight of the newest step in what a pass takes


class Stride:
    """seconds: how long a step of answers may take that makes more than one pass. beckons: whether something new is to
    be done, for which such a step ends early.
    """

    @classmethod
    def within(cls, milliseconds: float | None) -> "Stride":
        """None for one pass a step. Raises ConfigError."""
        if milliseconds is None:
            return cls(0.0)
        if not 0 < milliseconds < math.inf:
            raise ConfigError(f"stride_ms is {milliseconds}: it must be above 0 and finite, or None for single passes")
        return cls(milliseconds / 1000)

    def __init__(self, seconds: float):
        self.beckons: Callable[[], bool] = lambda: False
        self._seconds = seconds
        self._per_pass = math.inf

    @property
    def more(self) -> int:
        """Passes of the next step beyond its first; none before any step was timed."""
        return max(int(min(self._seconds / self._per_pass, _MOST)) - 1, 0)

    def took(self, num_passes: int, seconds: float) -> None:
        """A step of answers alone took so long. A clock that stands still or jumps back tells nothing."""
        if seconds <= 0.0:
            return
        newest = seconds / num_passes
        known = math.isfinite(self._per_pass)
        self._per_pass = self._per_pass + _NEWEST * (newest - self._per_pass) if known else newest

    def go_on(self, runner: Runner, most: int, lives: Sequence[Live], chosen: Sequence[list[int]]) -> int:
        """Up to `most` further passes of the step that was just run, each with the tokens chosen in the one before,
        whose own choices `chosen` gains; how many there were. None where an answer is to be looked at token by token,
        and none after a token that ends one.

        Raises FloatingPointError as `choose` does.
        """
        if not most or not all(live.needs_no_look for live in lives):
            return 0
        samplers = [live.sampler for live in lives]
        for passes in range(most):
            ended = any(live.ending.ends_with(ids[-1]) for live, ids in zip(lives, chosen, strict=True))
            if ended or self.beckons():
                return passes
            logits = runner.again([ids[-1] for ids in chosen])
            if logits is None:
                return passes
            for ids, token in zip(chosen, choose(logits, samplers), strict=True):
                ids.append(token)
        return most
