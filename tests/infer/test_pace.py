"""Prompts read beside answers, by a budget of milliseconds: the engine finds the chunk that fits, and no clock changes
an answer.
"""

from collections.abc import Iterator

import pytest

from daedal.errors import ConfigError
from daedal.infer.engine import Engine
from daedal.infer.pace import LEAST, Pace
from daedal.infer.request import Request, SamplingParams
from daedal.infer.scheduler import Step
from tests.infer.engines import assert_idle
from tests.tiny import tiny_model


def run(pace: Pace, seconds_per_token: float, fixed: float, steps: int) -> float:
    """The steps of a long prompt; how long the next one will take."""
    for _ in range(steps):
        taken = fixed + pace.budget * seconds_per_token
        pace.took(pace.budget, taken)
    return fixed + pace.budget * seconds_per_token


@pytest.mark.parametrize("seconds_per_token", [0.0003, 0.001, 0.002])
@pytest.mark.parametrize("fixed", [0.0, 0.03])
def test_steps_come_to_take_the_time_wanted(seconds_per_token: float, fixed: float) -> None:
    pace = Pace(0.1, most=512)
    assert run(pace, seconds_per_token, fixed, 20) == pytest.approx(0.1, rel=0.05)
    # Deeper contexts are slower, and the next prompt is a shallow one again.
    assert run(pace, seconds_per_token * 1.5, fixed, 20) == pytest.approx(0.1, rel=0.05)
    assert run(pace, seconds_per_token, fixed, 20) == pytest.approx(0.1, rel=0.05)


def test_bounds_and_steps_that_show_nothing() -> None:
    pace = Pace(0.1, most=300)
    first = pace.budget
    pace.took(3, 0.09)
    assert pace.budget == first
    pace.took(first, 0.0)
    assert pace.budget == 2 * first
    pace.took(2 * first, 3600.0)
    assert pace.budget == first
    run(pace, 0.00001, 0.0, 9)
    assert pace.budget == 300
    run(pace, 0.0, 0.5, 9)
    assert pace.budget == LEAST
    assert Pace(0.1, most=7).budget == 7


class Clock:
    """Tells seconds as the model would need them: so many for each token of the steps that ran."""

    def __init__(self, per_token: float):
        self.per_token, self.now, self.jumps = per_token, 0.0, iter(())

    def __call__(self) -> float:
        self.now += next(self.jumps, 0.0)
        return self.now


def watched(engine: Engine, clock: Clock) -> list[Step]:
    """The engine's steps as they run; each advances the clock."""
    steps: list[Step] = []
    schedule = engine._scheduler.schedule

    def noted(most_prompt_tokens: int | None, more: int) -> Step:
        step = schedule(most_prompt_tokens, more)
        steps.append(step)
        return step

    run = engine._run

    def timed(step: Step) -> tuple[list[object], int]:
        clock.now += step.num_tokens * clock.per_token
        return run(step)

    engine._scheduler.schedule, engine._run = noted, timed
    return steps


def answers(engine: Engine) -> dict[str, list[int]]:
    """One request that answers for long, and two long prompts that come while it does."""
    found: dict[str, list[int]] = {}
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine.add(Request(id="first", prompt=tuple(range(3, 40)), params=params))
    for turn in range(200):
        if turn in (4, 9):
            prompt = tuple(3 + (7 * turn + place) % 250 for place in range(400))
            engine.add(Request(id=f"long {turn}", prompt=prompt, params=params))
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.ids)
    assert_idle(engine)
    return found


def jumps() -> Iterator[float]:
    yield from (0.0, 0.0, 5.0, -7.0, 1e6, 0.0, 0.3) * 60


def test_long_prompts_leave_answers_their_pace_and_their_tokens() -> None:
    model = tiny_model("deepseek_v3")
    clock = Clock(per_token=0.001)
    paced = Engine(model, max_context=512, max_batch=4, prefill_ms=50, clock=clock)
    steps = watched(paced, clock)
    found = answers(paced)
    beside = [step for step in steps if step.num_prompt_tokens and len(step.chunks) > 1]
    assert len(beside) > 10
    assert all(step.num_tokens <= 67 for step in beside)  # the first guess, then no more than 50 fit
    assert max(step.num_tokens for step in beside[2:]) <= 52
    assert all("first" in {chunk.request_id for chunk in step.chunks} for step in beside[:8])
    assert found == answers(Engine(model, max_context=512, max_batch=4))
    jumping = Clock(per_token=0.001)
    jumping.jumps = jumps()
    assert found == answers(Engine(model, max_context=512, max_batch=4, prefill_ms=50, clock=jumping))


def test_a_prompt_that_nobody_waits_for_is_read_at_once() -> None:
    engine = Engine(tiny_model("deepseek_v3"), max_context=512, prefill_ms=1, clock=Clock(per_token=1.0))
    engine.add(Request(id="alone", prompt=tuple(range(3, 253)), params=SamplingParams(max_tokens=1)))
    assert engine.step()[0].finish_reason == "length"


@pytest.mark.parametrize("prefill_ms", [0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be(prefill_ms: float) -> None:
    with pytest.raises(ConfigError, match="prefill_ms is"):
        Engine(tiny_model("deepseek_v3"), prefill_ms=prefill_ms)
