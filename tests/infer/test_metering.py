"""Every request knows what it cost, and what all of them cost together is what the engine spent: nothing is lost."""

from collections.abc import Iterator

import pytest

from daedal.cost.flops import Feeding
from daedal.cost.spending import Price, Spent, Tariff
from daedal.infer.engine import Engine
from daedal.infer.request import Output, Request, SamplingParams
from daedal.model.transformer import Transformer
from tests.infer.engines import paged, speculation
from tests.infer.models import KINDS, prompts, tame, tiny


class Clock:
    """Every look at it takes an eighth of a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.125
        return self.now


class Energy:
    """Every look finds two joules more."""

    source, watts = "a test", None

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        self.joules += 2.0
        return self.joules


PRICE = Price(label="mine", dollars_per_second=0.5, dollars_per_joule=0.25)


def metered(model: Transformer, num_tokens: int, **given: object) -> Engine:
    return paged(model, num_tokens, clock=Clock(), tariff=Tariff(energy=Energy(), price=PRICE), **given)  # type: ignore[arg-type]


def together(spent: Iterator[Spent]) -> Spent:
    total = next(spent)
    for one in spent:
        total += one
    return total


def assert_same(one: Spent, other: Spent | None) -> None:
    assert other is not None
    assert one.flops == pytest.approx(other.flops, rel=1e-12)
    assert one.kv_byte_seconds == pytest.approx(other.kv_byte_seconds, rel=1e-12)
    assert one.device_seconds == pytest.approx(other.device_seconds, rel=1e-12)
    assert one.joules == pytest.approx(other.joules, rel=1e-12)
    assert one.dollars == pytest.approx(other.dollars, rel=1e-12)


def answers(engine: Engine, *lengths: int, max_tokens: int = 8) -> list[Output]:
    return engine.generate(prompts(*lengths), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [400, 48], ids=["room", "preemption"])
def test_the_shares_of_a_batch_add_up_to_the_whole(kind: str, num_tokens: int) -> None:
    engine = metered(tiny(kind), num_tokens, max_batch=4, max_step_tokens=16)
    outputs = answers(engine, 21, 3, 1, 9, 17, 5)
    stats = engine.stats()
    assert stats.num_preemptions > 0 or num_tokens == 400
    total = stats.spent_total
    assert_same(together(output.spent for output in outputs), total)
    # Whoever reads and writes more pays more, in a batch as alone.
    spent = [output.spent for output in outputs]
    if num_tokens == 400:
        assert sorted(range(6), key=lambda place: spent[place].flops) == [2, 1, 5, 3, 4, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_alone_costs_what_it_is_fed(kind: str) -> None:
    model = tiny(kind)
    engine = metered(model, 400, max_step_tokens=16)
    (output,) = answers(engine, 21)
    feeding = Feeding.of(model.config)
    # 16 and 5 tokens of the prompt, and the answer without its last token, one by one.
    expected = feeding.flops(0, 16, 0) + feeding.flops(16, 5, 1)
    expected += sum(feeding.flops(past, 1, 1) for past in range(21, 28))
    assert output.spent.flops == pytest.approx(expected, rel=1e-12)
    steps = 2 + 7
    # The engine looks once more at the clock than the meter does, before each step.
    assert output.spent.device_seconds == 0.125 * steps
    assert output.spent.joules == 2.0 * steps
    assert output.spent.dollars == 0.5 * output.spent.device_seconds + 0.25 * output.spent.joules


def test_memory_is_paid_by_the_time_that_it_is_held() -> None:
    engine = metered(tiny("compressed"), 400, max_batch=2, max_step_tokens=64)
    held: list[tuple[float, int]] = []
    for name, length in (("a", 9), ("b", 30)):
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        engine.add(Request(id=name, prompt=tuple(prompts(length)[0]), params=params))
    clock = engine._meter._clock
    spent = 0.0
    while engine.has_work:
        before = clock.now
        engine.step()
        # What was held when the step ended: those that finished gave theirs back only then.
        held.append((clock.now - before, engine.stats().kv_bytes_used))
        spent = engine.stats().spent_total.kv_byte_seconds
    # The first step is paid from its beginning, the others from the end of the one before.
    whole = [engine._plan.held_bytes(pages, sequences=2) for pages in _pages(engine._plan.page_size)]
    times = [0.125] + [time for time, _ in held[1:]]
    assert spent == pytest.approx(sum(time * nbytes for time, nbytes in zip(times, whole, strict=True)), rel=1e-12)
    assert [nbytes for _, nbytes in held[:-1]] == whole[:-1]


def _pages(size: int) -> list[int]:
    return [-(-(9 + step) // size) + -(-(30 + step) // size) for step in range(5)]


def test_rejected_drafts_are_paid_and_what_drafts_too() -> None:
    model = tame(tiny("latent", drafting=True))
    plain = answers(metered(model, 400), 12, max_tokens=12)[0]
    looked_up, own, drafted = (
        answers(metered(model, 400, speculate=speculation(method, model)), 12, max_tokens=12)[0]
        for method in ("lookup", "mtp", "model")
    )
    assert looked_up.ids == own.ids == drafted.ids == plain.ids
    assert plain.spent.flops <= looked_up.spent.flops
    assert plain.spent.flops < own.spent.flops
    assert 1.8 * plain.spent.flops < drafted.spent.flops  # by a model of the same size, which reads along


def test_prompt_logprobs_and_cancelled_requests_count() -> None:
    model = tiny("dense")
    prompt = prompts(20)[0]
    scored, plain = (
        metered(model, 400).generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=asked))[0]
        for asked in (0, None)
    )
    assert scored.spent.flops - plain.spent.flops == 19 * Feeding.of(model.config).head
    engine = metered(model, 400)
    engine.add(Request(id="a", prompt=tuple(prompt), params=SamplingParams(max_tokens=30, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    assert engine.cancel("a")
    (output,) = engine.step()
    assert output.finish_reason == "cancelled"
    assert_same(output.spent, engine.stats().spent_total)
    assert not engine._meter._tallies


def test_without_a_tariff_nothing_is_counted() -> None:
    engine = paged(tiny("dense"), 400)
    assert answers(engine, 5)[0].spent is None
    assert engine.stats().spent_total is None
