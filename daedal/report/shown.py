"""Numbers of a report as people read them: prefixes of units, intervals, what a quality is called.

What is small is shown by the million: dollars of answers, bytes, bits. Knows no layout.
"""

import math

from daedal.report.lines import BYTE_SECONDS, DOLLARS, FLOPS, JOULES, RESOURCES, SECONDS, Line, Quality
from daedal.report.redraws import Figure
from daedal.report.settings import COUNTED, MEASURED, Off, Place
from daedal.report.workloads import Measure

ABSENT = "–"
_UNITS = {DOLLARS: "$", JOULES: "J", FLOPS: "FLOP", BYTE_SECONDS: "B·s", SECONDS: "s"}
_NAMES = {
    DOLLARS: "dollars",
    JOULES: "energy",
    FLOPS: "compute",
    BYTE_SECONDS: "memory × time",
    SECONDS: "device time",
}
_PREFIXES = ("p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E")
_PLAIN = 4  # the place of no prefix
_MILLION = 1e6


def heading(resource: str) -> str:
    """What a column of a resource is called."""
    return _NAMES[resource]


def unit(resource: str) -> str:
    """Without a prefix."""
    return _UNITS[resource]


def per(measure: Measure, *, gain: bool, resource: str | None = None) -> str:
    """Of what a cost is: "correct answer", "million bytes". resource: dollars are shown by the million."""
    what = measure.gain if gain else measure.amount
    if not (measure.million or resource == DOLLARS):
        return what
    noun, _, rest = what.partition(" ")
    plural = f"{what}s" if not rest or noun == "correct" else f"{noun}s {rest}"
    return f"million {plural}"


def cost(resource: str, value: float | None, measure: Measure) -> str:
    """A cost for what `per` names."""
    if value is None:
        return ABSENT
    scaled = value * (_MILLION if measure.million or resource == DOLLARS else 1.0)
    return f"${_digits(scaled)}" if resource == DOLLARS else quantity(scaled, _UNITS[resource])


def cost_interval(resource: str, figure: Figure, measure: Measure) -> str:
    """From low to high; empty without bounds."""
    return _between(*(None if end is None else cost(resource, end, measure) for end in (figure.low, figure.high)))


def quality(found: Quality) -> str:
    """ "41.2 %" or "1.0312"."""
    return quality_value(found.measure, found.value.value)


def quality_interval(found: Quality) -> str:
    """From low to high; empty without bounds."""
    return figure_interval(found.measure, found.value)


def group_value(measure: Measure, figure: Figure) -> str:
    """Of one task or kind, with its interval."""
    interval = figure_interval(measure, figure)
    return quality_value(measure, figure.value) + (f" ({interval})" if interval else "")


def figure_interval(measure: Measure, figure: Figure) -> str:
    """Of a quality."""
    return _between(*(None if end is None else quality_value(measure, end) for end in (figure.low, figure.high)))


def times(figure: Figure | None) -> str:
    """A ratio with its interval, empty where there is none."""
    if figure is None or figure.value is None:
        return ""
    known = figure.low is not None and figure.high is not None
    return f"× {figure.value:.3g}" + (f" ({figure.low:.3g}–{figure.high:.3g})" if known else "")


def place(found: Place) -> str:
    """Where, in words."""
    if found.source == COUNTED:
        return "anywhere"
    where = "this machine" if found.devices == "this" else found.devices
    return f"{where}, while it answered" if found.batch is None else f"{where}, batch {found.batch}"


def off(found: Off, source: str) -> str:
    """How far figures may be off, a sentence."""
    if source == COUNTED:
        return "counted from the model’s shapes"
    if source == MEASURED and found.spread is None:
        return "measured while the answers were given, each reply’s share of its steps"
    if source == MEASURED:
        return f"measured; half of the repeats lie within {found.spread:.0%}"
    if found.median is None or found.ninth is None:
        return "predicted; held against no measurement of such hardware"
    return (
        f"predicted; {found.pairs} such predictions were off by {found.median:.0%} in the median, nine of ten by at "
        f"most {found.ninth:.0%}"
    )


def usual(line: Line) -> str:
    """The resource that stands for a line where one must: money is a table's, so energy, else what is counted."""
    return next(name for name in (JOULES, SECONDS, FLOPS, *RESOURCES) if name in line.costs)


def quantity(value: float, unit: str) -> str:
    """0.00312 and "J" become "3.12 mJ"."""
    if value == 0:
        return f"0 {unit}"
    power = min(max(math.floor(math.log10(abs(value)) / 3 + 1e-9), -_PLAIN), len(_PREFIXES) - 1 - _PLAIN)
    scaled = value / 1000.0**power
    if round(abs(scaled)) >= 1000 and power < len(_PREFIXES) - 1 - _PLAIN:
        power, scaled = power + 1, scaled / 1000
    return f"{_digits(scaled)} {_PREFIXES[power + _PLAIN]}{unit}"


def quality_value(measure: Measure, value: float | None) -> str:
    """Of whatever measure."""
    if value is None:
        return ABSENT
    return f"{value:.1%}".replace("%", " %") if measure.higher_is_better else f"{value:.4f}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _between(low: str | None, high: str | None) -> str:
    if low is None:
        return "" if high is None else f"up to {high}"
    return f"from {low}" if high is None else f"{low} – {high}"
