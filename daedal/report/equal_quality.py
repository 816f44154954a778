"""What two families of models cost at the same quality: read off between their points, never beyond them.

A family is a line through its models that no other of it beats in both quality and cost, the cost in logarithms. Two
families are compared at the quality of every model of either that the lines of both reach. Rounds of the bootstrap draw
both lines and that quality anew; rounds in which a line does not reach it are left out of the interval, which says so.
Knows nothing of how costs came about.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from daedal.report.costing import Drawn
from daedal.report.lines import Equal
from daedal.report.redraws import ROUNDS, Figure

_LOST = 0.05  # of rounds that may not reach a quality

Point = tuple[float, float]
"""A quality, turned so that more is better, and the logarithm of a cost."""


def equal_quality(drawn: Sequence[Drawn], resource: str) -> list[Equal]:
    """The first family of two or more models beside every other family; empty without one, or without another."""
    families: dict[str, list[Drawn]] = {}
    for one in drawn:
        if resource in one.costs and one.costs[resource].rounds.min() > 0:
            families.setdefault(one.line.family or one.line.model, []).append(one)
    base = next((name for name, members in families.items() if len(members) > 1), None)
    if base is None:
        return []
    return [found for other in families if other != base for found in _compared(base, other, families, resource)]


def _compared(base: str, other: str, families: Mapping[str, Sequence[Drawn]], resource: str) -> Iterator[Equal]:
    bases, members = families[base], families[other]
    wholes = {id(one): _whole(one, resource) for one in (*bases, *members)}
    turns = {id(one): _turns(one, resource) for one in (*bases, *members)}
    place, whole = bases[0].line.place, _pair(bases, members, wholes)
    helds = [{key: points[turn] for key, points in turns.items()} for turn in range(ROUNDS)]
    rounds = [(held, _pair(bases, members, held)) for held in helds]
    met = False
    for one in sorted((*bases, *members), key=lambda one: wholes[id(one)]):
        costs = _costs(whole, wholes[id(one)][0])
        if costs is None:
            continue
        met = True
        drawn = [found for held, pair in rounds if (found := _costs(pair, held[id(one)][0])) is not None]
        yield Equal(
            base=base,
            other=other,
            place=place,
            resource=resource,
            at=one.line.model,
            quality=one.line.quality.value.value,
            base_cost=costs[0],
            other_cost=costs[1],
            ratio=_ratio(costs, drawn),
            why=None,
        )
    if not met:
        why = _apart(base, other, bases, members)
        yield Equal(base=base, other=other, place=place, resource=resource, why=why)


def _whole(one: Drawn, resource: str) -> Point:
    return one.line.quality.goodness, math.log(one.costs[resource].whole / one.amount.whole)


def _turns(one: Drawn, resource: str) -> list[Point]:
    """The same in each round."""
    sign = 1 if one.line.quality.measure.higher_is_better else -1
    goodness = sign * one.score.rounds / one.amount.rounds
    costs = np.log(one.costs[resource].rounds / one.amount.rounds)
    return list(zip(goodness.tolist(), costs.tolist(), strict=True))


def _pair(
    bases: Sequence[Drawn], members: Sequence[Drawn], points: Mapping[int, Point]
) -> tuple[list[Point], list[Point]]:
    return _curve([points[id(one)] for one in bases]), _curve([points[id(one)] for one in members])


def _curve(points: Sequence[Point]) -> list[Point]:
    """By rising quality, and so by rising cost: what another beats in both is left out."""
    kept: list[Point] = []
    for goodness, cost in sorted(points):
        while kept and kept[-1][1] >= cost:
            kept.pop()
        kept.append((goodness, cost))
    return kept


def _costs(pair: tuple[list[Point], list[Point]], goodness: float) -> tuple[float, float] | None:
    """Of both at one quality; None where one does not reach it."""
    first, second = (_read_off(curve, goodness) for curve in pair)
    return None if first is None or second is None else (first, second)


def _read_off(curve: Sequence[Point], goodness: float) -> float | None:
    if not curve[0][0] <= goodness <= curve[-1][0]:
        return None
    upper = bisect_left(curve, (goodness, -math.inf))
    above = curve[upper]
    if above[0] == goodness:
        return math.exp(above[1])
    below = curve[upper - 1]
    share = (goodness - below[0]) / (above[0] - below[0])
    return math.exp(below[1] + share * (above[1] - below[1]))


def _ratio(whole: tuple[float, float], drawn: Sequence[tuple[float, float]]) -> Figure:
    value, lost = whole[0] / whole[1], 1 - len(drawn) / ROUNDS
    if not drawn:
        return Figure(value=value, low=None, high=None, why="no other draw of the work reaches this quality with both")
    low, high = np.quantile([base / other for base, other in drawn], (0.025, 0.975))
    why = f"in {lost:.0%} of the draws one of the two does not reach this quality" if lost > _LOST else None
    return Figure(value=value, low=float(low), high=float(high), why=why)


def _apart(base: str, other: str, bases: Sequence[Drawn], members: Sequence[Drawn]) -> str:
    return (
        f"{base} was measured at {_span(bases)} and {other} at {_span(members)} "
        f"({bases[0].line.quality.measure.name}), which do not meet: nothing is extrapolated, evaluate sizes between"
    )


def _span(members: Sequence[Drawn]) -> str:
    values = sorted(one.line.quality.value.value or 0.0 for one in members)
    return " to ".join(dict.fromkeys(f"{value:.4g}" for value in (values[0], values[-1])))
