"""What a request will hold and take, known before it begins: bytes as the planner counts them, seconds by the latest
steps.
"""

import pytest

from daedal import shapes
from daedal.cost import cached
from daedal.errors import CapacityError, DeadlineError
from daedal.infer.engine import Engine
from daedal.infer.forecast import BELIEVED_SECONDS, FEWEST, Ahead, Answers, Forecast
from daedal.infer.request import Request, SamplingParams
from tests.infer.engines import assert_idle
from tests.infer.test_pace import Clock, watched
from tests.tiny import tiny_model

FREE = Ahead(prompt_tokens=0, starts=0)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_bytes_are_the_planners_on_whole_pages(family: str) -> None:
    model = tiny_model(family)
    engine = Engine(model, max_batch=2, cache_bytes=2**21)
    plan, cache = engine._plan, shapes.cache(model.config)

    def size(slot: shapes.Slot) -> int:
        return cached.in_numbers(model.dtype.itemsize, slot)

    growing = [slot for slot in cache if not slot.ring]
    for num_pages in (1, 2, 5):
        num_tokens = num_pages * plan.page_size
        planned = cached.at_context(growing, num_tokens, size)
        assert plan.request_bytes(num_tokens) - plan.state_bytes == planned
        assert plan.request_bytes(num_tokens - plan.page_size + 1) == plan.request_bytes(num_tokens)
    assert plan.state_bytes >= cached.ring_bytes(cache, size)
    assert plan.request_bytes(plan.page_size * plan.num_pages) <= plan.nbytes


def test_what_can_never_fit_is_refused_in_bytes_and_what_fits_later_waits() -> None:
    engine = Engine(tiny_model("deepseek_v3"), max_batch=2, page_size=4, cache_bytes=2**16)
    held, capacity = engine._plan.request_bytes, engine.max_context - 1
    most = SamplingParams(max_tokens=capacity - 3, temperature=0.0, ignore_eos=True)
    with pytest.raises(CapacityError, match="lower it, or give the engine more cache_bytes") as caught:
        engine.add(Request(id="big", prompt=(1,) * 9, params=most))
    assert f"({held(capacity + 5)} bytes)" in str(caught.value)
    assert f"({held(capacity)} bytes)" in str(caught.value)
    for name in ("one", "two"):
        engine.add(Request(id=name, prompt=(1, 2, 3, 4), params=most))
    ended = [output.request_id for _ in range(4 * capacity) for output in engine.step() if output.finish_reason]
    assert ended == ["one", "two"]
    assert_idle(engine)


def test_times_are_medians_of_the_latest_and_not_believed_for_long() -> None:
    answers = Answers()
    for _ in range(8):
        answers.ended(40)
    forecast = Forecast(answers)

    def seconds(num_prompt: int, num_answer: int, ahead: Ahead = FREE, now: float = 1.0) -> float:
        return forecast.seconds(num_prompt, num_answer, ahead, max_batch=4, now=now)

    assert seconds(1000, 1000) == 0.0
    for _ in range(FEWEST - 1):
        forecast.took(100, 1.0, now=1.0)
    assert seconds(1000, 0) == 0.0, "too few steps are known"
    forecast.took(100, 1000.0, now=1.0)
    forecast.took(3, 1000.0, now=1.0)
    assert seconds(200, 10) == pytest.approx(2.0)
    for _ in range(FEWEST):
        forecast.took(0, 0.5, now=1.0)
    assert seconds(200, 10) == pytest.approx(2.0 + 5.0)
    # 300 tokens to read before, and the third of those who wait: of four that run, one ends every ten steps.
    assert seconds(200, 10, Ahead(prompt_tokens=300, starts=3)) == pytest.approx(5.0 + 0.5 * 40)
    assert seconds(200, 10, now=2.0 + BELIEVED_SECONDS) == 0.0
    forecast.took(0, -3.0, now=9.0)
    assert seconds(200, 10, now=1.0) == pytest.approx(2.0), "a clock that went back is not believed"


def _asked(name: str, length: int, seconds: float | None, **params: object) -> Request:
    prompt = tuple(3 + (len(name) * 7 + place * place) % 250 for place in range(length))
    return Request(id=name, prompt=prompt, params=SamplingParams(temperature=0.0, **params), seconds=seconds)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    """A clock that gives each token a millisecond: 200 tokens of prompt take 0.2 s, and those before it their own."""
    clock = Clock(per_token=0.001)
    engine = Engine(tiny_model("deepseek_v3"), max_context=512, max_batch=2, max_step_tokens=64, clock=clock)
    watched(engine, clock)
    engine.add(_asked("unknown", 300, 1e-6, max_tokens=20, ignore_eos=True))
    for _ in range(60):
        engine.step()
    assert_idle(engine)
    engine.add(_asked("in time", 200, 0.21, max_tokens=1))
    with pytest.raises(DeadlineError, match=r"within 0.3 s, .* needs at least 0\.4") as behind:
        engine.add(_asked("behind others", 200, 0.3, max_tokens=1))
    assert behind.value.wait == pytest.approx(0.1, abs=0.02), "what is before it takes so much longer than it may wait"
    with pytest.raises(DeadlineError):
        engine.add(_asked("a long answer", 1, 0.25, max_tokens=300, ignore_eos=True))
    engine.add(_asked("a long answer that may end", 1, 0.25, max_tokens=300))
    engine.add(_asked("no deadline", 200, None, max_tokens=1))
    while engine.has_work:
        engine.step()
    # What is in the cache takes no time.
    engine.add(_asked("in time", 200, 0.05, max_tokens=1))
    with pytest.raises(DeadlineError):
        engine.add(_asked("in time!", 200, 0.05, max_tokens=1))
    clock.now += 2 * BELIEVED_SECONDS
    engine.add(_asked("later", 200, 0.05, max_tokens=1))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), "soon", True])
def test_seconds_that_cannot_be(seconds: object) -> None:
    with pytest.raises(ValueError, match="seconds is"):
        Request(id="r", prompt=(1,), params=SamplingParams(), seconds=seconds)  # type: ignore[arg-type]
