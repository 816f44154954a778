"""Which requests an engine can serve: at all, by its model and size, and now, beside others and in the time they have.

Everything is checked before a request is queued, so that nothing that was accepted fails later for a reason that was
known at once. What a request will hold is counted as the planner counts it (`cost.cached`). Knows no tensors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from daedal.errors import CapacityError, DeadlineError, OverloadError, RequestError
from daedal.infer.forecast import Ahead, Forecast
from daedal.infer.prefixes import Prefixes
from daedal.infer.request import Request
from daedal.infer.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True)
class Limits:
    """vocab_size: of the model. context: tokens of prompt and answer together. capacity: tokens the cache holds.

    has_text: whether the engine has a tokenizer, without which there are no stop strings. held_bytes: what so many
    tokens of one request take in the cache, by the planner's count.
    """

    vocab_size: int
    context: int
    capacity: int
    has_text: bool
    held_bytes: Callable[[int], int] | None = None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that one request can reach."""
        return min(self.context, self.capacity + 1)

    def check(self, request: Request) -> None:
        """Raises RequestError, or CapacityError where only a larger cache would help."""
        params, length = request.params, len(request.prompt)
        self._check_ids("prompt", request.prompt)
        self._check_ids("stop_ids", params.stop_ids)
        self._check_ids("logit_bias", params.logit_bias)
        if params.stop and not self.has_text:
            raise RequestError("stop strings need text, and this engine has no tokenizer: use stop_ids", param="stop")
        if length > self.context or (length == self.context and params.max_tokens > 0):
            raise RequestError(
                f"prompt has {length} tokens, the context is {self.context} and needs room for an answer: shorten it",
                param="prompt",
            )
        # The last token generated is never fed, so it needs no place in the cache.
        fed = min(length + params.max_tokens, self.context) - 1 if params.max_tokens else length
        if fed > self.capacity:
            param = "prompt" if length > self.capacity else "max_tokens"
            size = "" if self.held_bytes is None else f" ({self.held_bytes(fed)} bytes)"
            room = "" if self.held_bytes is None else f" ({self.held_bytes(self.capacity)} bytes)"
            raise CapacityError(
                f"{param} makes the request keep up to {fed} tokens{size} in the cache, which has room for "
                f"{self.capacity}{room}: lower it, or give the engine more cache_bytes",
                param=param,
            )

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{name} holds the id {token}, the vocabulary has {self.vocab_size}: "
                    f"give ids from 0 to {self.vocab_size - 1}",
                    param=name,
                )


class Admission:
    """Which requests can be served now, beside those that are under way. clock: gives seconds. The rest as `Engine` has
    it.
    """

    def __init__(
        self,
        max_batch: int,
        max_waiting: int | None,
        scheduler: Scheduler,
        prefixes: Prefixes,
        forecast: Forecast,
        clock: Callable[[], float],
    ):
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._scheduler, self._prefixes, self._forecast = scheduler, prefixes, forecast
        self._clock = clock

    def has_room(self, under_way: int) -> bool:
        """Whether there is room for one more."""
        return self._max_waiting is None or under_way < self._max_batch + self._max_waiting

    def check_room(self, count: int, under_way: int) -> None:
        """Raises OverloadError if `count` more requests do not fit now, RequestError if they never could together."""
        if self._max_waiting is None:
            return
        most = self._max_batch + self._max_waiting
        if count > most:
            raise RequestError(
                f"{count} answers are asked for at once, at most {most} are taken: ask for fewer", param="n"
            )
        if under_way + count > most:
            raise OverloadError(
                f"{under_way} requests are under way, the limit is {self._max_batch} running and "
                f"{self._max_waiting} waiting: try again later"
            )

    def check_time(self, request: Request) -> None:
        """DeadlineError if a request probably needs more time than it has, whatever it finds in the cache."""
        if request.seconds is None:
            return
        num_prompt, ahead = len(request.prompt), self._scheduler.ahead(request.priority)
        if self._needed(request, num_prompt, ahead) <= request.seconds:
            return
        ahead = replace(ahead, prompt_tokens=int(ahead.prompt_tokens * (1 - self._prefixes.hit_rate)))
        chain = self._prefixes.chain(salt=request.cache_salt)
        found = self._prefixes.find(chain, request.prompt).num_tokens
        if (needed := self._needed(request, num_prompt - found, ahead)) > request.seconds:
            raise DeadlineError(
                f"the request is to be answered within {request.seconds:.3g} s, and at the pace of the latest steps it "
                f"needs at least {needed:.3g} s: give it a longer timeout, ask for less, or try again later",
                wait=needed - request.seconds,
            )

    def _needed(self, request: Request, num_unread: int, ahead: Ahead) -> float:
        return self._forecast.seconds(
            num_unread, request.params.num_certain, ahead, max_batch=self._max_batch, now=self._clock()
        )
