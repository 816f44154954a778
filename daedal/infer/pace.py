"""How many tokens of prompts a step may read while others wait for their next token: learnt from how long steps took.

A step's time is what its answers cost and what its prompt tokens cost, and the latter grow with the context, so no
rate is kept: the budget follows the last step in proportion, at most twofold at once. That finds the tokens that fit
the time wanted, and no clock that jumps can mislead it for long. Knows seconds and counts only: no clock, no requests.
"""

import math

from daedal.errors import ConfigError

LEAST = 16  # tokens: a prompt goes on even where the answers alone take longer than wanted
_FIRST = 64


class Pace:
    """seconds: how long a step that reads prompts should take. most: tokens that a step can hold."""

    @classmethod
    def within(cls, milliseconds: float | None, *, most: int) -> "Pace | None":
        """None where there is no bound. Raises ConfigError."""
        if milliseconds is None:
            return None
        if not 0 < milliseconds < math.inf:
            raise ConfigError(f"prefill_ms is {milliseconds}: it must be above 0 and finite, or None for no bound")
        return cls(milliseconds / 1000, most=most)

    def __init__(self, seconds: float, *, most: int):
        self._seconds = seconds
        self._most = most
        self.budget = min(_FIRST, most)

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step with `num_tokens` > 0 of prompts took so long. A smaller step than allowed shows nothing by being
        fast: most of its time may have been the answers'.
        """
        if num_tokens < self.budget and seconds <= self._seconds:
            return
        wanted = num_tokens * self._seconds / max(seconds, 1e-9)
        changed = int(min(max(wanted, self.budget / 2), self.budget * 2))
        self.budget = min(max(changed, LEAST), self._most)
