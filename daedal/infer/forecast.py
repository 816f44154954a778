"""What is to be expected of requests, learnt from those before: how long answers become, and how long work takes.

Times are of the latest steps, by their medians, and are not believed when the last of them is long ago: what was slow
once must not keep an engine from ever trying again. Knows seconds and counts only: no clock, no requests.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median

LATEST = 16  # steps
FEWEST = 4  # of them, before any time is told
LEAST_TOKENS = 16  # of prompts in a step whose time tells of prompts
BELIEVED_SECONDS = 60.0
_LATEST_ANSWERS = 64
_FEWEST_ANSWERS = 8


class Answers:
    """How long answers become."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_LATEST_ANSWERS)
        self.usual = 0

    def ended(self, num_tokens: int) -> None:
        """One came to its end by itself, or to the length that was asked for."""
        self._lengths.append(num_tokens)
        known = sorted(self._lengths)
        self.usual = known[3 * len(known) // 4] if len(known) >= _FEWEST_ANSWERS else 0

    def left(self, num_tokens: int, most: int) -> int:
        """Tokens that an answer of so many, which may have `most` in all, probably still gets: three of four of the
        latest had no more. 0 where too few are known, or the answer is longer than most.
        """
        return max(min(self.usual, most) - num_tokens, 0)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a request would have to wait for. prompt_tokens: to be read before its own. starts: requests that must end
    before it can start.
    """

    prompt_tokens: int
    starts: int


class Forecast:
    """How long work takes. answers: how long they become."""

    def __init__(self, answers: Answers):
        self._answers = answers
        self._per_prompt_token: deque[float] = deque(maxlen=LATEST)
        self._per_step: deque[float] = deque(maxlen=LATEST)
        self._read_at = self._answered_at = float("-inf")

    def took(self, num_prompt_tokens: int, seconds: float, now: float) -> None:
        """A step took so long. `num_prompt_tokens`: of prompts among what it fed."""
        if num_prompt_tokens >= LEAST_TOKENS:
            self._per_prompt_token.append(max(seconds, 0.0) / num_prompt_tokens)
            self._read_at = now
        elif not num_prompt_tokens:
            self._per_step.append(max(seconds, 0.0))
            self._answered_at = now

    def seconds(self, num_prompt: int, num_answer: int, ahead: Ahead, *, max_batch: int, now: float) -> float:
        """What a request takes at least until it has `num_answer` tokens; 0 for whatever nobody knows.

        A request that waits for others gets a place when as many have ended, and of `max_batch` that run side by side
        one ends every `usual / max_batch` steps.
        """
        steps = num_answer + ahead.starts * self._answers.usual / max_batch
        reading = _usual(self._per_prompt_token, self._read_at, now)
        return reading * (num_prompt + ahead.prompt_tokens) + _usual(self._per_step, self._answered_at, now) * steps


def _usual(times: deque[float], latest: float, now: float) -> float:
    believed = len(times) >= FEWEST and 0 <= now - latest <= BELIEVED_SECONDS
    return median(times) if believed else 0.0
