"""Learning-rate schedules at their corners, against formulas written out, and what they refuse."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daedal.errors import ConfigError
from daedal.train.schedule import V4_FLASH_RATE, V4_FLOOR, V4_WARMUP, Schedule


def test_warm_up_reaches_the_peak_in_equal_parts() -> None:
    schedule = Schedule(steps=10, warmup=4, decay="constant")
    assert [schedule.at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("decay", "half"),
    [("cosine", (1 + math.cos(math.pi / 2)) / 2), ("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))],
)
def test_decay_starts_after_the_stretch_and_ends_at_the_floor(decay: str, half: float) -> None:
    schedule = Schedule(steps=100, warmup=10, decay=decay, decay_steps=20, floor=0.1)  # type: ignore[arg-type]
    assert schedule.at(79) == 1.0
    assert schedule.at(80) < 1.0
    assert schedule.at(89) == pytest.approx(0.1 + 0.9 * half, abs=1e-12)
    assert schedule.at(99) == pytest.approx(0.1, abs=1e-12)
    assert schedule.at(10**9) == schedule.at(99)


def test_without_a_stretch_all_after_the_warm_up_decays() -> None:
    schedule = Schedule(steps=12, warmup=2, decay="linear", floor=0.0)
    assert [schedule.at(step) for step in range(12)] == pytest.approx(
        [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    )


def test_v4_numbers() -> None:
    schedule = Schedule(steps=100_000, warmup=V4_WARMUP, floor=V4_FLOOR)
    assert V4_FLASH_RATE * schedule.at(1999) == 2.7e-4
    assert V4_FLASH_RATE * schedule.at(99_999) == pytest.approx(2.7e-5)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay_steps=st.none() | st.integers(0, 300),
    decay=st.sampled_from(["constant", "cosine", "linear", "sqrt"]),
    floor=st.floats(0.0, 1.0),
)
def test_any_schedule_rises_once_then_never_again(
    steps: int, warmup: int, decay_steps: int | None, decay: str, floor: float
) -> None:
    try:
        schedule = Schedule(steps=steps, warmup=warmup, decay_steps=decay_steps, decay=decay, floor=floor)  # type: ignore[arg-type]
    except ConfigError:
        assert warmup + (decay_steps or 0) > steps or (decay == "constant" and decay_steps is not None)
        return
    factors = [schedule.at(step) for step in range(steps + 5)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    tail = factors[max(warmup - 1, 0) :]
    assert all(after <= before + 1e-15 for before, after in pairwise(tail))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` is 0: it must be a whole number of at least 1"),
        ({"steps": "1000"}, "`steps` is the text '1000'"),
        ({"steps": 10.0}, "`steps` is 10.0"),
        ({"warmup": 11}, "`warmup` is 11, `steps` is 10: give a shorter warm-up"),
        ({"warmup": -1}, "`warmup` is -1"),
        ({"warmup": True}, "`warmup` is True"),
        ({"floor": 1.5}, "`floor` is 1.5: it must be a number from 0 to 1"),
        ({"floor": math.nan}, "`floor` is nan"),
        ({"decay": "exp"}, "`decay` is 'exp': it must be one of constant, cosine, linear, sqrt"),
        ({"decay": "constant", "decay_steps": 3}, "a constant rate"),
        ({"warmup": 5, "decay_steps": 6}, "they must fit into the run"),
    ],
)
def test_what_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(**{"steps": 10, **changes})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps are counted from 0"):
        Schedule(steps=10).at(-1)
