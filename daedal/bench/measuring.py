"""One model on this machine: rates of prompts and of decoding, bytes and joules, each beside what was predicted.

Everything runs through `Engine`. A prediction is for the tokens that the sequences held while they were measured; it is
left out, with the reason, where the planner cannot make it. Knows no file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daedal.bench.timing import Clock, Timing, repeated, shared
from daedal.bench.workload import Workload
from daedal.cost import plan
from daedal.cost.energy import Meter
from daedal.cost.hardware import THIS, Chip
from daedal.cost.prices import Prices
from daedal.cost.work import Model
from daedal.errors import ConfigError, RequestError
from daedal.infer.cache import KvDtype

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer

_SHORT = 2048  # tokens of prompts that are read several times, whatever it takes


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What the planner would say. model: in the formats that are measured. chip: this machine, calibrated."""

    model: Model
    chip: Chip
    prices: Prices

    def rate(self, phase: str, *, batch: int, context: int) -> float | None:
        """Tokens per second of all sequences; None where the planner says that it does not fit."""
        found = plan.predict(
            self.model, hardware=THIS, chip=self.chip, devices=1, context=context, batch=batch, prices=self.prices
        )
        rate = found.decode if phase == "decode" else found.prefill
        return None if rate is None else rate.tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Phase:
    """tokens: of one repeat. held: tokens of one sequence meanwhile, on average. joules_per_token: None where nothing
    counts them. Rates are in tokens per second of all sequences.
    """

    name: str
    tokens: int
    held: int
    timing: Timing
    joules_per_token: float | None
    predicted: float | None

    @property
    def rate(self) -> float:
        return self.tokens / self.timing.median

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        return None if self.predicted is None else self.predicted / self.rate - 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """A batch and a context. kv_bytes: of the cache as allocated for it; kv_bytes_predicted: of its sequences at the
    whole context. refusal: why there are no figures, None where there are.
    """

    batch: int
    context: int
    kv_bytes: int | None = None
    kv_bytes_predicted: int | None = None
    phases: Sequence[Phase] = ()
    refusal: str | None = None


def measure(
    model: "Transformer",
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    kv_cache_dtype: KvDtype = "auto",
    seconds: float,
    meter: Meter | None,
    predictor: Predictor | None,
    clock: Clock = time.perf_counter,
    note: Callable[[str], None] = lambda what: None,
) -> Iterator[Point]:
    """A point for each context and batch, in this order, as it is found. One that has no room is refused, not an error.
    seconds: of each phase at least; one repeat may take longer.
    """
    for context in contexts:
        for batch in batches:
            note(f"{batch} x {context:,} tokens")
            try:
                load = Workload(model, batch=batch, context=context, kv_cache_dtype=kv_cache_dtype)
                phases = _phases(load, seconds=seconds, meter=meter, predictor=predictor, clock=clock)
            except (ConfigError, RequestError) as error:
                yield Point(batch=batch, context=context, refusal=str(error))
                continue
            yield Point(
                batch=batch,
                context=context,
                kv_bytes=load.stats().kv_bytes_total,
                kv_bytes_predicted=None if predictor is None else batch * predictor.model.kv_bytes(context),
                phases=phases,
            )


def _phases(
    load: Workload, *, seconds: float, meter: Meter | None, predictor: Predictor | None, clock: Clock
) -> list[Phase]:
    def phase(name: str, tokens: int, held: int, timing: Timing, joules: float | None) -> Phase:
        context = max(held, 1)
        predicted = None if predictor is None else predictor.rate(name, batch=load.batch, context=context)
        every = tokens * len(timing.seconds)
        per_token = None if joules is None else joules / every
        return Phase(
            name=name, tokens=tokens, held=held, timing=timing, joules_per_token=per_token, predicted=predicted
        )

    short = load.batch * load.context <= _SHORT
    least = 3 if short else 1
    timing, joules = _metered(repeated, load.read_prompts, clock, seconds, meter, least=least, most=1000, warm=short)
    read = phase("prefill", load.batch * (load.context - 1), load.context - 1, timing, joules)
    load.start()
    load.step()
    before = load.held
    most = max(load.steps_left, 1)
    timing, joules = _metered(shared, load.step, clock, seconds, meter, least=min(3, most), most=most, warm=False)
    held = (before + load.held) // 2
    return [read, phase("decode", load.batch, held, timing, joules)]


def _metered(
    repeat: Callable[..., Timing],
    call: Callable[[], int],
    clock: Clock,
    seconds: float,
    meter: Meter | None,
    *,
    least: int,
    most: int,
    warm: bool,
) -> tuple[Timing, float | None]:
    if warm:
        call()
    before = None if meter is None else meter.read()
    timing = repeat(call, clock=clock, seconds=seconds, least=least, most=most, warm=False)
    return timing, None if meter is None or before is None else meter.read() - before
