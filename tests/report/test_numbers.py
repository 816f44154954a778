"""Sums that are redrawn, prices without an answer, and what two families cost at one quality: against sums by hand."""

import numpy as np
import pytest

from daedal.report.costing import Drawn
from daedal.report.equal_quality import equal_quality
from daedal.report.lines import JOULES, Cost, Line, Quality
from daedal.report.redraws import ROUNDS, Figure, Sums, price, ratio, redraw
from daedal.report.settings import Off, Place
from daedal.report.workloads import ACCURACY, BITS, Measure


def test_a_price_is_pooled_and_its_interval_is_that_of_the_items() -> None:
    rng = np.random.default_rng(3)
    right, cost = (rng.random(400) < 0.3).astype(float), rng.uniform(1.0, 3.0, 400)
    gain, spent, one = redraw(["a"] * 400, [right, cost, np.ones(400)])
    found = price(spent, gain, units=400)
    assert found.value == pytest.approx(cost.sum() / right.sum())
    # The spread of a ratio, by the delta method.
    expected = 1.96 * np.sqrt(np.var(cost - found.value * right) / 400) / right.mean()
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * expected, rel=0.12)
    assert one.rounds.tolist() == [400.0] * ROUNDS


def test_tasks_are_drawn_apart_and_the_same_work_is_drawn_alike() -> None:
    groups = ["b", "a"] * 30
    in_a = [float(group == "a") for group in groups]
    values = np.random.default_rng(1).normal(size=60)
    share, first = redraw(groups, [in_a, values])
    assert set(share.rounds) == {30.0}
    (second,) = redraw(groups, [2 * values])
    assert np.allclose(second.rounds, 2 * first.rounds)
    assert np.std(first.rounds) > 1


def test_one_unit_has_a_price_and_no_interval() -> None:
    gain, cost = redraw(["a"], [[1.0], [3.0]])
    for found in (price(cost, gain, units=1), ratio(cost, gain, units=1)):
        assert (found.value, found.low, found.high) == (3.0, None, None)
        assert found.why == "one unit of work tells no interval"


def test_few_gains_have_no_upper_bound() -> None:
    gain, cost = redraw(["a"] * 40, [[1.0] + [0.0] * 39, [1.0] * 40])
    found = price(cost, gain, units=40)
    assert (found.value, found.high) == (40.0, None)
    assert found.low is not None
    assert found.low < 40
    assert "none" in str(found.why)


def drawn(
    name: str, family: str | None, quality: float, cost: float, measure: Measure = ACCURACY, noise: float = 0.0
) -> Drawn:
    """A model of 100 items whose quality moves between rounds by so much."""
    moves = np.random.default_rng(sum(map(ord, name))).normal(0.0, noise or 1e-12, ROUNDS)
    figure = Figure(value=quality, low=None, high=None)
    amount = Sums(whole=100.0, rounds=np.full(ROUNDS, 100.0))
    costs = Sums(whole=100 * cost, rounds=np.full(ROUNDS, 100 * cost))
    score = Sums(whole=100 * quality, rounds=100 * (quality + moves))
    line = Line(
        model=name,
        family=family,
        quality=Quality(
            measure=measure, units=100, amount=100.0, gains=50.0, value=figure, chance=None, groups={"task": figure}
        ),
        place=Place(devices="h200", batch=1, source="predicted"),
        off=Off(),
        costs={JOULES: Cost(per_amount=figure, per_gain=figure, beside=None)},
        price=None,
        energy=None,
    )
    return Drawn(line=line, score=score, amount=amount, gain=score, costs={JOULES: costs})


def test_costs_at_equal_quality_lie_on_lines_in_logarithms() -> None:
    dense = [drawn("small", "dense", 0.2, 1.0), drawn("large", "dense", 0.6, 100.0)]
    sparse = [drawn("s", "sparse", 0.3, 1.0), drawn("l", "sparse", 0.5, 4.0)]
    found = equal_quality([*dense, *sparse], JOULES)
    assert [(one.at, one.quality) for one in found] == [("s", 0.3), ("l", 0.5)]
    assert [one.base_cost for one in found] == pytest.approx([10**0.5, 10**1.5])
    assert [one.other_cost for one in found] == pytest.approx([1.0, 4.0])
    assert [one.ratio.value for one in found if one.ratio] == pytest.approx([10**0.5, 10**1.5 / 4])


def test_fewer_bits_are_better() -> None:
    dense = [drawn("small", "dense", 2.0, 1.0, BITS), drawn("large", "dense", 1.0, 100.0, BITS)]
    (found,) = equal_quality([*dense, drawn("one", None, 1.5, 5.0, BITS)], JOULES)
    assert (found.base, found.other, found.quality) == ("dense", "one", 1.5)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(2.0)


def test_nothing_is_extrapolated() -> None:
    dense = [drawn("small", "dense", 0.2, 1.0), drawn("large", "dense", 0.4, 10.0)]
    (found,) = equal_quality([*dense, drawn("better", None, 0.41, 1.0)], JOULES)
    assert (found.ratio, found.base_cost, found.quality) == (None, None, None)
    assert found.why == (
        "dense was measured at 0.2 to 0.4 and better at 0.41 (accuracy), which do not meet: nothing is extrapolated, "
        "evaluate sizes between"
    )
    # Within, but so near to the end that half of the draws lie beyond it.
    (near,) = equal_quality([*dense, drawn("near", None, 0.3999, 1.0, noise=0.05)], JOULES)
    assert near.ratio is not None
    assert "of the draws one of the two does not reach this quality" in str(near.ratio.why)
    assert equal_quality([dense[0], drawn("other", None, 0.2, 1.0)], JOULES) == []


def test_a_model_that_its_family_beats_is_no_part_of_the_line() -> None:
    dense = [drawn("a", "dense", 0.2, 1.0), drawn("bad", "dense", 0.3, 500.0), drawn("b", "dense", 0.4, 4.0)]
    found = {one.at: one for one in equal_quality([*dense, drawn("x", None, 0.3, 1.0)], JOULES)}
    assert found["x"].base_cost == pytest.approx(2.0)
