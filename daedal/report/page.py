"""A report as one page for people: the answer first, then each workload, place by place, then what was left out.

The page needs nothing from anywhere else: pictures are inline, and it is light or dark as the reader's system is. Every
figure in it comes from a `Line`, beside its quality. Knows how nothing was measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from daedal.report import shown
from daedal.report.lines import FLOPS, JOULES, RESOURCES, SECONDS, Cost, Equal, Line, Report, Section
from daedal.report.pictures import COLOURS, marks, picture
from daedal.report.settings import COUNTED, Place
from daedal.report.workloads import Measure


def page(report: Report) -> str:
    """One HTML document."""
    source = resources.files("daedal.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        report=report,
        colours=COLOURS,
        headlines=[sentence for section in report.sections for sentence in headlines(section)],
        sections=[_section(section) for section in report.sections],
    )


def headlines(section: Section) -> Iterator[str]:
    """The cheapest gain in the first place that knows energy, else time, else by what is counted, guessing left out;
    empty where none has a price.
    """
    for resource in (JOULES, SECONDS, FLOPS):
        places = [place for place in section.places() if any(resource in line.costs for line in section.at(place))]
        if places:
            yield from _headline(section, section.at(places[0]), resource)
            return


def _headline(section: Section, lines: Sequence[Line], resource: str) -> Iterator[str]:
    priced = [(line.costs[resource].per_gain.value, line) for line in lines if resource in line.costs]
    real = ((value, line) for value, line in priced if value and not line.quality.guesses)
    known = sorted(real, key=lambda pair: pair[0])
    if not known:
        return
    measure, best = section.measure, known[0][1]
    paid = shown.cost(resource, known[0][0], measure)
    where = "" if best.place.source == COUNTED else f" on {shown.place(best.place)}, {best.place.source}"
    sentence = (
        f"{section.name.capitalize()}: {best.model} asks {paid} for a {shown.per(measure, gain=True)}{where}, at "
        f"{shown.quality(best.quality)}"
    )
    sentence += " correct" if measure.higher_is_better else f" {measure.name}"
    if len(known) > 1:
        dearest = known[-1][1]
        sentence += f"; {dearest.model} asks {known[-1][0] / known[0][0]:.3g} times as much, at "
        sentence += shown.quality(dearest.quality)
    yield f"{sentence}."


def _section(section: Section) -> dict[str, Any]:
    lines = {line.model: line for line in section.lines}
    return {
        "title": section.name.capitalize(),
        "measure": section.measure.name,
        "lead": _lead(section),
        "notes": section.notes,
        "groups": section.groups,
        "by_group": [
            (name, [shown.group_value(section.measure, line.quality.groups[group]) for group in section.groups])
            for name, line in lines.items()
        ],
        "places": [_place(section, place) for place in section.places()],
    }


def _lead(section: Section) -> str:
    quality = section.lines[0].quality
    if section.measure.higher_is_better:
        guessing = f" Guessing would get {quality.chance:.1%} right." if quality.chance else ""
        return f"{quality.units:,} items of {', '.join(section.groups)}, the same for all models.{guessing}"
    saved = "; ".join(section.references)
    return (
        f"{quality.amount:,.0f} bytes in {quality.units:,} windows for {section.lines[0].model}. Bits saved are those "
        f"that knowing the text saves against a reference: {saved}."
    )


def _place(section: Section, place: Place) -> dict[str, Any]:
    lines = section.at(place)
    measure, drawn, first = section.measure, shown.usual(lines[0]), lines[0]
    # What is counted is the same everywhere, and stands in the first table.
    wanted = [name for name in RESOURCES if (name == FLOPS) is (place.source == COUNTED)]
    known = [name for name in wanted if any(name in line.costs for line in lines)]
    colours = {mark.line.model: mark.colour for mark in marks(lines, drawn)}
    sources = [f"Dollars: {first.price}." if first.price else "", f"Joules: {first.energy}." if first.energy else ""]
    return {
        "name": shown.place(place).capitalize(),
        "source": place.source,
        "off": shown.off(max(lines, key=lambda line: line.off.spread or 0.0).off, place.source).capitalize(),
        "from": " ".join(filter(None, sources)),
        "headings": [(shown.heading(name), f"per {shown.per(measure, gain=True, resource=name)}") for name in known],
        "rows": [
            {
                "model": line.model,
                "family": line.family,
                "colour": colours.get(line.model, 0),
                "cells": [
                    (shown.quality(line.quality), shown.quality_interval(line.quality), _gains(line)),
                    *(_cell(name, line.costs.get(name), measure) for name in known),
                ],
            }
            for line in lines
        ],
        "picture": picture(lines, drawn, title=f"{section.name}: {measure.name} over {shown.heading(drawn)}"),
        "equal_unit": f"{shown.heading(drawn)} per {shown.per(measure, gain=False, resource=drawn)}",
        "equal": [_equal(one, measure) for one in section.equal if (one.place, one.resource) == (place, drawn)],
    }


def _gains(line: Line) -> str:
    quality = line.quality
    if quality.measure.higher_is_better:
        return f"{quality.gains:,.0f} of {quality.units:,}"
    joules = line.costs.get(JOULES)
    if joules is None or not joules.per_gain.value:
        return ""
    return f"{1 / joules.per_gain.value:,.0f} bits saved per joule"


def _cell(resource: str, cost: Cost | None, measure: Measure) -> tuple[str, ...]:
    if cost is None:
        return (shown.ABSENT,)
    main = shown.cost(resource, cost.per_gain.value, measure)
    return main, shown.cost_interval(resource, cost.per_gain, measure), shown.times(cost.beside)


def _equal(one: Equal, measure: Measure) -> Mapping[str, str | None]:
    if one.ratio is None or one.quality is None:
        return {"why_not": one.why}
    return {
        "why_not": None,
        "pair": f"{one.base} and {one.other}",
        "at": one.at,
        "quality": shown.quality_value(measure, one.quality),
        "base": f"{one.base} {shown.cost(one.resource, one.base_cost, measure)}",
        "other": f"{one.other} {shown.cost(one.resource, one.other_cost, measure)}",
        "ratio": shown.times(one.ratio),
        "why": one.ratio.why,
    }
