"""The pictures of the grounding report, as SVG that stands in the page and takes its colours from the page's style.

Rates are bars with their intervals, calibration is a reliability diagram, training two curves one above the other, each
on its own scale. Classes name who is shown ("teacher", "student", "reference"); every mark has its numbers as a
tooltip. Knows no colours and no files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from daedal.charts import path, spacing, svg
from daedal.distill.verdict import Evaluations, Planted
from daedal.eval.calibration import Bin
from daedal.eval.estimates import Estimate

_WIDTH, _LEFT, _RIGHT = 640, 235, 70
_ROW, _BAR = 30, 16
_SIDE = 320  # of the reliability diagram's square
_PANEL = 130  # height of one curve


class _Scale(Protocol):
    """From values to places on the page."""

    def __call__(self, value: float, /) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bar. who: a class of the style. dots: single runs behind the value. estimate: None is shown as "no items"."""

    label: str
    who: str
    estimate: Estimate | None
    dots: tuple[float, ...] = ()


def bars(rows: Sequence[Row], *, title: str) -> str:
    """Shares from 0 to the largest end of an interval, one bar a row. Negative values begin at 0 and go left."""
    known = [row.estimate for row in rows if row.estimate is not None]
    ends = [end for each in known for end in (each.low, each.high, each.value)]
    ends += [dot for row in rows for dot in row.dots]
    low, high = min(0.0, *ends, 0.0), max([*ends, 0.02])
    low, high = _round_out(low, high)
    span = _WIDTH - _LEFT - _RIGHT

    def x(value: float) -> float:
        return _LEFT + span * (value - low) / (high - low)

    height = _ROW * len(rows) + 34
    parts = list(_grid_x(low, high, x, height - 24))
    for place, row in enumerate(rows):
        parts += _bar(row, 4 + place * _ROW, x)
    return svg(_WIDTH, height, title, parts)


def _bar(row: Row, top: float, x: _Scale) -> Iterator[str]:
    middle = top + _BAR / 2 + 3
    yield f'<text x="{_LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
    found = row.estimate
    if found is None:
        yield f'<text x="{x(0) + 6:.1f}" y="{middle + 4:.1f}" class="faint">no items</text>'
        return
    first, last = sorted((x(0), x(found.value)))
    told = f"{row.label}: {_percent(found.value)} ({_percent(found.low)} to {_percent(found.high)})"
    yield f'<g class="{row.who}"><title>{escape(told)}</title>'
    wide = max(last - first, 1)
    yield f'<rect x="{first:.1f}" y="{top + 3}" width="{wide:.1f}" height="{_BAR}" rx="2" class="fill"/>'
    yield (
        f'<path d="M{x(found.low):.1f} {middle}H{x(found.high):.1f}M{x(found.low):.1f} {middle - 4}v8'
        f'M{x(found.high):.1f} {middle - 4}v8" class="whisker"/>'
    )
    for dot in row.dots:
        yield f'<circle cx="{x(dot):.1f}" cy="{middle}" r="3" class="dot"><title>{_percent(dot)}</title></circle>'
    ends = [x(found.high), last, *(x(dot) for dot in row.dots)]
    yield f'</g><text x="{max(ends) + 8:.1f}" y="{middle + 4:.1f}">{_percent(found.value)}</text>'


def planted_rows(planted: Planted) -> list[Row]:
    """An arm a row: the mean over seeds, from its least to its largest, and each seed as a dot."""
    who = {planted.control: "reference", planted.gated: "student"}
    return [
        Row(
            label=f"{arm.letter}  {arm.title}",
            who=who.get(arm.letter, "teacher"),
            estimate=Estimate(value=arm.mean, low=min(arm.transfer), high=max(arm.transfer)),
            dots=arm.transfer,
        )
        for arm in planted.arms
    ]


def reliability_diagram(models: Mapping[str, Sequence[Bin]], *, title: str) -> str:
    """Accuracy over confidence for each model, bin by bin; on the diagonal a model is right as often as it is sure."""
    left, top = 54, 10

    def x(value: float) -> float:
        return left + _SIDE * value

    def y(value: float) -> float:
        return top + _SIDE * (1 - value)

    parts = []
    for step in range(6):
        share = step / 5
        parts.append(f'<path d="M{x(0)} {y(share):.1f}H{x(1)}M{x(share):.1f} {y(0)}V{y(1)}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end" class="faint">{share:.1f}</text>')
        parts.append(f'<text x="{x(share):.1f}" y="{y(0) + 18}" text-anchor="middle" class="faint">{share:.1f}</text>')
    parts.append(f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" class="diagonal"/>')
    for place, (name, found) in enumerate(models.items()):
        held = [each for each in found if each.confidence is not None and each.accuracy is not None]
        most = max((each.count for each in held), default=1)
        points = [(x(each.confidence or 0.0), y(each.accuracy or 0.0), each) for each in held]
        parts.append(
            f'<g class="{name}"><polyline points="{path((across, up) for across, up, _ in points)}" class="line"/>'
        )
        for across, up, each in points:
            told = f"{name}: {each.count} items, sure {each.confidence:.2f}, right {each.accuracy:.2f}"
            radius = 2.5 + 5 * math.sqrt(each.count / most)
            parts.append(
                f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius:.1f}" class="fill"><title>{told}</title></circle>'
            )
        key = top + 16 + 20 * place
        parts.append(f'<circle cx="{x(1) + 24}" cy="{key - 4}" r="5" class="fill"/></g>')
        parts.append(f'<text x="{x(1) + 36}" y="{key}">{name}</text>')
    parts.append(f'<text x="{x(0.5)}" y="{y(0) + 38}" text-anchor="middle">confidence</text>')
    parts.append(f'<text transform="rotate(-90)" x="{-y(0.5)}" y="14" text-anchor="middle">share that is right</text>')
    return svg(left + _SIDE + 130, top + _SIDE + 48, title, parts)


def curves(evaluations: Evaluations, *, title: str) -> str:
    """Divergence from the teacher above, real text below, over tokens trained on."""
    left, right = 64, 20
    most = max(evaluations.tokens_E[-1], 1)

    def x(tokens: float) -> float:
        return left + (_WIDTH - left - right) * tokens / most

    parts: list[str] = []
    curves = (
        ("likeness to the teacher: KL, nats a token", evaluations.divergence_E, "teacher"),
        ("real text that is held out: nats a token", evaluations.nll_E, "student"),
    )
    for place, (label, values, who) in enumerate(curves):
        parts += _curve(label, evaluations.tokens_E, values, who, x, 24 + place * (_PANEL + 44))
    bottom = 24 + 2 * _PANEL + 44
    parts.append(f'<text x="{x(most / 2):.1f}" y="{bottom + 36}" text-anchor="middle">tokens trained on</text>')
    for share in (0.0, 0.5, 1.0):
        at = f'<text x="{x(share * most):.1f}" y="{bottom + 18}" text-anchor="middle" class="faint">'
        parts.append(f"{at}{round(share * most):,}</text>")
    return svg(_WIDTH, bottom + 44, title, parts)


def _curve(
    label: str, tokens_E: Sequence[int], values_E: Sequence[float], who: str, x: _Scale, top: float
) -> Iterator[str]:
    low, high = min(values_E), max(values_E)
    margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin

    def y(value: float) -> float:
        return top + _PANEL * (1 - (value - low) / (high - low))

    yield f'<text x="{x(0):.1f}" y="{top - 8}">{escape(label)}</text>'
    for value in (low + margin, (low + high) / 2, high - margin):
        yield f'<path d="M{x(0):.1f} {y(value):.1f}H{x(tokens_E[-1]):.1f}" class="grid"/>'
        yield f'<text x="{x(0) - 8:.1f}" y="{y(value) + 4:.1f}" text-anchor="end" class="faint">{value:.3f}</text>'
    points = [(x(tokens), y(value), value) for tokens, value in zip(tokens_E, values_E, strict=True)]
    yield f'<g class="{who}"><polyline points="{path((across, up) for across, up, _ in points)}" class="line"/>'
    for (across, up, value), tokens in zip(points, tokens_E, strict=True):
        told = f"{value:.4f} after {tokens:,} tokens"
        yield f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3" class="fill"><title>{told}</title></circle>'
    yield "</g>"


def _grid_x(low: float, high: float, x: _Scale, bottom: float) -> Iterator[str]:
    apart = spacing(high - low)
    for number in range(round(low / apart), round(high / apart) + 1):
        value = number * apart
        yield f'<path d="M{x(value):.1f} 2V{bottom}" class="{"axis" if number == 0 else "grid"}"/>'
        yield f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle" class="faint">{100 * value:g} %</text>'


def _round_out(low: float, high: float) -> tuple[float, float]:
    apart = spacing(high - low)
    return math.floor(low / apart + 1e-9) * apart, math.ceil(high / apart - 1e-9) * apart


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
