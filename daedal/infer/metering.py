"""What each request has cost so far: after every step its work, its memory over time, and its share of time and energy.

A step's time and energy are shared among its requests by their shares of the work, so all shares add up to the whole.
Work is counted from the configuration as `daedal cost` counts it, of all tokens that were fed: also those of rejected
drafts and of prompts read again, but not those that the cache already had. What drafts counts one token for each that
it reads or guesses from. Knows no text, no prices by name and no tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from daedal.config import ModelConfig
from daedal.cost.flops import Feeding
from daedal.cost.spending import Spent, Tariff
from daedal.infer.speculative import Speculation
from daedal.infer.step import Chunk, Step


@dataclass(slots=True)
class _Tally:
    flops: float = 0.0
    kv_byte_seconds: float = 0.0
    device_seconds: float = 0.0
    joules: float = 0.0


class Meter:
    """Counts for one engine. config: of the model that serves. clock: gives seconds."""

    def __init__(
        self, config: ModelConfig, tariff: Tariff, speculate: Speculation | None, *, clock: Callable[[], float]
    ):
        self._model, self._drafter = Feeding.of(config), _drafter(config, speculate)
        self._tariff, self._clock = tariff, clock
        self._energy = tariff.energy
        self._tallies: dict[str, _Tally] = {}
        self._total = _Tally()
        self._paid_until: dict[str, float] = {}
        self._start = self._joules = 0.0

    @property
    def total(self) -> Spent:
        """Of all requests since the meter was made, cancelled ones included."""
        return self._spent(self._total)

    def begin(self) -> None:
        """A step begins."""
        self._start = self._clock()
        if self._energy is not None:
            self._joules = self._energy.read()

    def ran(self, step: Step, rows: Mapping[str, int], held: Mapping[str, int], *, more: int = 0) -> None:
        """It is over. rows: of logits, by request. held: bytes of the cache that each request has, those that waited in
        this step included. more: passes beyond the first, each with a token of every answer.
        """
        now = self._clock()
        seconds = now - self._start
        joules = 0.0 if self._energy is None else self._energy.read() - self._joules
        work = [self._work(chunk, rows.get(chunk.request_id, 0) + more, more) for chunk in step.chunks]
        every = sum(work)
        for chunk, flops in zip(step.chunks, work, strict=True):
            share = flops / every
            self._add(chunk.request_id, _Tally(flops, 0.0, seconds * share, joules * share))
        for request_id, nbytes in held.items():
            # Who was not there when the last step ended has come since.
            since = self._paid_until.get(request_id, self._start)
            self._add(request_id, _Tally(kv_byte_seconds=nbytes * (now - since)))
        self._paid_until = dict.fromkeys(held, now)

    def spent(self, request_id: str) -> Spent:
        """What a request has cost so far; nothing, where it has not run yet."""
        return self._spent(self._tallies.get(request_id, _Tally()))

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._tallies.pop(request_id, None)
        self._paid_until.pop(request_id, None)

    def _work(self, chunk: Chunk, rows: int, more: int) -> float:
        flops = self._model.flops(chunk.past, len(chunk.fed) + more, rows)
        if self._drafter is None:
            return flops
        guesses = len(chunk.drafts)
        return flops + self._drafter.flops(chunk.past, len(chunk.ids) + max(guesses - 1, 0), guesses)

    def _add(self, request_id: str, more: _Tally) -> None:
        for tally in (self._tallies.setdefault(request_id, _Tally()), self._total):
            tally.flops += more.flops
            tally.kv_byte_seconds += more.kv_byte_seconds
            tally.device_seconds += more.device_seconds
            tally.joules += more.joules

    def _spent(self, tally: _Tally) -> Spent:
        return self._tariff.spent(
            flops=tally.flops,
            kv_byte_seconds=tally.kv_byte_seconds,
            device_seconds=tally.device_seconds,
            joules=tally.joules,
        )


def _drafter(config: ModelConfig, speculate: Speculation | None) -> Feeding | None:
    """What a drafted token costs; None where it is only looked up."""
    if speculate is None or speculate.method == "lookup":
        return None
    return Feeding.of_drafting(config) if speculate.draft_model is None else Feeding.of(speculate.draft_model.config)
