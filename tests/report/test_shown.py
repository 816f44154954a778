"""Numbers as people read them: prefixes, what is shown by the million, and places on a logarithmic axis."""

import pytest

from daedal.report import shown
from daedal.report.lines import DOLLARS, FLOPS, JOULES
from daedal.report.redraws import Figure
from daedal.report.workloads import ACCURACY, BITS


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 J"),
        (1, "1 J"),
        (0.9996, "1 J"),
        (0.0995, "99.5 mJ"),
        (1234, "1.23 kJ"),
        (999_600, "1 MJ"),
        (3e-15, "0.003 pJ"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, said: str) -> None:
    assert shown.quantity(value, "J") == said


def test_dollars_and_texts_are_shown_by_the_million() -> None:
    assert (shown.cost(JOULES, 0.5, ACCURACY), shown.per(ACCURACY, gain=True)) == ("500 mJ", "correct answer")
    assert shown.cost(DOLLARS, 2e-6, ACCURACY) == "$2"
    assert shown.per(ACCURACY, gain=True, resource=DOLLARS) == "million correct answers"
    assert shown.per(ACCURACY, gain=False, resource=DOLLARS) == "million items"
    assert (shown.cost(FLOPS, 2e3, BITS), shown.per(BITS, gain=True)) == ("2 GFLOP", "million bits saved")
    assert shown.per(BITS, gain=False) == "million bytes"


def test_bounds_that_are_not_there_are_not_made_up() -> None:
    known = Figure(value=2.0, low=1.0, high=4.0)
    assert shown.cost_interval(JOULES, known, ACCURACY) == "1 J – 4 J"
    assert shown.cost_interval(JOULES, Figure(value=None, low=1.0, high=None), ACCURACY) == "from 1 J"
    assert shown.cost_interval(JOULES, Figure(value=2.0, low=None, high=None), ACCURACY) == ""
    assert (shown.cost(JOULES, None, ACCURACY), shown.times(None)) == ("–", "")
    assert shown.times(known) == "× 2 (1–4)"
