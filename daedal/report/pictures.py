"""The frontier as a picture: quality over what it costs, as SVG that stands in the page and takes its colours from it.

Costs run in logarithms to the right, quality upwards, whichever way its number runs. A model is a point with its
intervals, a family a line, and the frontier is what no other model beats in both. Every mark has its numbers as a
tooltip. Takes lines alone, so no cost is drawn without its quality. Knows no colours and no files.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from daedal.charts import path, spacing, svg
from daedal.report import shown
from daedal.report.lines import Line

_WIDTH, _HEIGHT = 680, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 14, 52
COLOURS = 8


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One model. x: cost for an item or a byte, with its ends; y: goodness, with its ends."""

    line: Line
    colour: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def marks(lines: Sequence[Line], resource: str) -> list[Mark]:
    """Of one place; a family has one colour."""
    colours = {name: place % COLOURS for place, name in enumerate(dict.fromkeys(map(group, lines)))}
    return [
        Mark(line=line, colour=colours[group(line)], x=_ends(line, resource), y=_goodness(line))
        for line in lines
        if resource in line.costs and _ends(line, resource)[0] > 0
    ]


def group(line: Line) -> str:
    """What shares a colour and a line."""
    return line.family or line.model


def frontier(found: Sequence[Mark]) -> list[Mark]:
    """By rising cost: the models that none beats in both quality and cost."""
    best: list[Mark] = []
    for mark in sorted(found, key=lambda one: (one.x[0], -one.y[0])):
        if not best or mark.y[0] > best[-1].y[0]:
            best.append(mark)
    return best


def picture(lines: Sequence[Line], resource: str, *, title: str) -> str:
    """One place, one resource; empty where nothing is known of it."""
    found = marks(lines, resource)
    if not found:
        return ""
    measure = found[0].line.quality.measure
    across = _Axis.logarithmic([end for mark in found for end in mark.x], _LEFT, _WIDTH - _RIGHT)
    up = _Axis.linear([end for mark in found for end in mark.y], _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for value in across.ticks:
        at = across(value)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" class="grid"/>')
        label = escape(shown.cost(resource, value, measure))
        parts.append(
            f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" class="faint">{label}</text>'
        )
    for value in up.ticks:
        at = up(value)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" class="grid"/>')
        label = f"{100 * value:.3g} %" if measure.higher_is_better else f"{-value:.3g}"
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" class="faint">{label}</text>')
    best = path((across(mark.x[0]), up(mark.y[0])) for mark in frontier(found))
    parts.append(f'<polyline points="{best}" class="frontier"/>')
    parts += _families(found, across, up)
    for mark in found:
        parts += _mark(mark, resource, across, up)
    per = f"{shown.heading(resource)} per {shown.per(measure, gain=False, resource=resource)}"
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(per)}</text>')
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="rotate(-90)" x="-{height}" y="14" text-anchor="middle">{escape(measure.name)}</text>'
    )
    return svg(_WIDTH, _HEIGHT, title, parts)


def _families(found: Sequence[Mark], across: "_Axis", up: "_Axis") -> Iterator[str]:
    for name in dict.fromkeys(group(mark.line) for mark in found):
        members = sorted((mark for mark in found if group(mark.line) == name), key=lambda mark: mark.x[0])
        if len(members) > 1:
            through = path((across(mark.x[0]), up(mark.y[0])) for mark in members)
            yield f'<polyline points="{through}" class="family c{members[0].colour}"/>'


def _mark(mark: Mark, resource: str, across: "_Axis", up: "_Axis") -> Iterator[str]:
    x, y = across(mark.x[0]), up(mark.y[0])
    quality, cost = mark.line.quality, mark.line.costs[resource].per_amount
    measure = quality.measure
    told = (
        f"{mark.line.model}: {shown.quality(quality)} ({shown.quality_interval(quality) or 'no interval'}), "
        f"{shown.cost(resource, cost.value, measure)} per {shown.per(measure, gain=False, resource=resource)}"
    )
    yield f'<g class="c{mark.colour}"><title>{escape(told)}</title>'
    yield f'<path d="M{across(mark.x[1]):.1f} {y:.1f}H{across(mark.x[2]):.1f}" class="whisker"/>'
    yield f'<path d="M{x:.1f} {up(mark.y[1]):.1f}V{up(mark.y[2]):.1f}" class="whisker"/>'
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="fill"/></g>'
    yield f'<text x="{x + 9:.1f}" y="{y - 7:.1f}" class="name">{escape(mark.line.model)}</text>'


def _ends(line: Line, resource: str) -> tuple[float, float, float]:
    figure = line.costs[resource].per_amount
    assert figure.value is not None
    return figure.value, figure.low or figure.value, figure.high or figure.value


def _goodness(line: Line) -> tuple[float, float, float]:
    value, sign = line.quality.value, 1 if line.quality.measure.higher_is_better else -1
    assert value.value is not None
    low = value.value if value.low is None else value.low
    high = value.value if value.high is None else value.high
    return sign * value.value, sign * low, sign * high


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """From values to places on the page, with the values that are marked."""

    low: float
    high: float
    start: float
    end: float
    logarithms: bool
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log10(one) for one in (self.low, self.high, value))
            if self.logarithms
            else (
                self.low,
                self.high,
                value,
            )
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    @classmethod
    def logarithmic(cls, values: Sequence[float], start: float, end: float) -> "_Axis":
        low, high = min(values) / 1.25, max(values) * 1.25
        units = (1, 2, 5) if high / low < 100 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marked = [unit * 10.0**power for power in powers for unit in units]
        ticks = [value for value in marked if low <= value <= high]
        every = -(-len(ticks) // 7)
        return cls(low=low, high=high, start=start, end=end, logarithms=True, ticks=ticks[:: max(every, 1)])

    @classmethod
    def linear(cls, values: Sequence[float], start: float, end: float) -> "_Axis":
        span = max(values) - min(values) or abs(max(values)) or 1.0
        low, high = min(values) - 0.12 * span, max(values) + 0.12 * span
        apart = spacing(high - low)
        first, last = math.ceil(low / apart), math.floor(high / apart)
        ticks = [place * apart for place in range(first, last + 1)]
        return cls(low=low, high=high, start=start, end=end, logarithms=False, ticks=ticks)
