"""Units of work times what their tokens cost: the lines of one workload in one place, with intervals.

FLOPs are counted unit by unit from the model's own shapes; seconds, joules, dollars and byte·seconds are those of a
token of the setting, times tokens. Sums over units are redrawn once for all resources, so that everything of a line,
and lines of other models on the same work, move together. Writes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from daedal.cost.flops import Feeding
from daedal.report.lines import BYTE_SECONDS, DOLLARS, FLOPS, JOULES, SECONDS, Cost, Line, Quality
from daedal.report.redraws import Figure, Sums, price, ratio, redraw
from daedal.report.settings import COUNTED, Setting, Token
from daedal.report.workloads import Done, Measure, Unit

_UNLIKELY = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A line and the sums that it is made of. costs: by resource."""

    line: Line
    score: Sums
    amount: Sums
    gain: Sums
    costs: Mapping[str, Sums]


def lines_of(done: Sequence[Done], settings: Sequence[Setting], measure: Measure) -> list[Drawn]:
    """A line for each model: `settings` has its setting, all of one place. What is beside, is beside the first."""
    found: list[Drawn] = []
    for one, setting in zip(done, settings, strict=True):
        found.append(_drawn(one, setting, measure, found[0] if found else None))
    return found


def _drawn(done: Done, setting: Setting, measure: Measure, first: Drawn | None) -> Drawn:
    units = done.units
    columns = dict(_columns(done, setting))
    groups = [unit.group for unit in units]
    rows = [[unit.score for unit in units], [unit.amount for unit in units], [unit.gain for unit in units]]
    score, amount, gain, *sums = redraw(groups, [*rows, *columns.values()])
    costs = dict(zip(columns, sums, strict=True))
    quality = Quality(
        measure=measure,
        units=len(units),
        amount=amount.whole,
        gains=gain.whole,
        value=ratio(score, amount, units=len(units)),
        chance=_chance(units),
        groups=_by_group(units),
    )
    line = Line(
        model=done.subject.name,
        family=done.subject.family,
        quality=quality,
        place=setting.place,
        off=setting.off,
        costs={
            name: Cost(
                per_amount=ratio(cost, amount, units=len(units)),
                per_gain=_per_gain(cost, gain, quality),
                beside=None if first is None or name not in first.costs else _beside(cost, gain, first, name, quality),
            )
            for name, cost in costs.items()
        },
        price=setting.price,
        energy=setting.energy,
    )
    return Drawn(line=line, score=score, amount=amount, gain=gain, costs=costs)


def _columns(done: Done, setting: Setting) -> Iterator[tuple[str, list[float]]]:
    """Each resource with what every unit takes of it."""
    yield FLOPS, _flops(done)
    if setting.place.source == COUNTED:
        return
    for resource in (DOLLARS, JOULES, BYTE_SECONDS, SECONDS):
        each = [_spent(unit, setting, resource) for unit in done.units]
        known = [value for value in each if value is not None]
        if len(known) == len(each):
            yield resource, known


def _flops(done: Done) -> list[float]:
    feeding = Feeding.of(done.subject.config)

    @cache
    def read(past: int, tokens: int) -> float:
        return feeding.flops(past, tokens, 0) if tokens else 0.0

    @cache
    def written(past: int, tokens: int) -> float:
        return feeding.written(past, tokens) if tokens else 0.0

    return [
        read(0, unit.shared)
        + sum(read(unit.shared, ending) for ending in unit.endings)
        + feeding.head * unit.logits
        + written(unit.read, unit.written)
        for unit in done.units
    ]


def _spent(unit: Unit, setting: Setting, resource: str) -> float | None:
    if setting.recorded:
        return _recorded(unit, setting, resource)
    total = 0.0
    for tokens, token in ((unit.read, setting.read), (unit.written, setting.written)):
        if tokens:
            each = None if token is None else _of(token, resource)
            if each is None:
                return None
            total += tokens * each
    return total


def _recorded(unit: Unit, setting: Setting, resource: str) -> float | None:
    if resource == DOLLARS and setting.per_second is not None and unit.seconds is not None:
        return setting.per_second * unit.seconds
    return {SECONDS: unit.seconds, JOULES: unit.joules}.get(resource)


def _of(token: Token, resource: str) -> float | None:
    amounts = {
        DOLLARS: token.dollars,
        JOULES: token.joules,
        BYTE_SECONDS: token.byte_seconds,
        SECONDS: token.seconds,
    }
    return amounts[resource]


def _chance(units: Sequence[Unit]) -> float | None:
    known = [unit.chance for unit in units if unit.chance is not None]
    return sum(known) / len(known) if known else None


def _by_group(units: Sequence[Unit]) -> dict[str, Figure]:
    found = {}
    for group in sorted({unit.group for unit in units}):
        mine = [unit for unit in units if unit.group == group]
        score, amount = redraw([group] * len(mine), [[one.score for one in mine], [one.amount for one in mine]])
        found[group] = ratio(score, amount, units=len(mine))
    return found


def _per_gain(cost: Sums, gain: Sums, quality: Quality) -> Figure:
    if gain.whole > 0:
        return price(cost, gain, units=quality.units)
    if not quality.measure.higher_is_better:
        return Figure(
            value=None, low=None, high=None, why="it saves no bits against the reference, so none has a price"
        )
    most = 1 - _UNLIKELY ** (1 / quality.units)
    why = (
        f"none of {quality.units:,} answers is correct, so a correct one has no price: were {most:.2%} right, as many "
        "as such a sample hides in one case of twenty, it would cost the lower bound"
    )
    return Figure(value=None, low=cost.whole / (quality.units * most), high=None, why=why)


def _beside(cost: Sums, gain: Sums, first: Drawn, name: str, quality: Quality) -> Figure:
    """This price over the first model's, redrawn together."""
    other = first.costs[name]
    if gain.whole <= 0 or first.gain.whole <= 0 or other.whole <= 0:
        return Figure(value=None, low=None, high=None, why="one of the two has no price")
    above = Sums(whole=cost.whole * first.gain.whole, rounds=cost.rounds * first.gain.rounds)
    below = Sums(whole=other.whole * gain.whole, rounds=other.rounds * gain.rounds)
    return price(above, below, units=min(quality.units, first.line.quality.units))
