"""The same frontiers as PNG files, one for each workload. Needs matplotlib (daedal[plots])."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from daedal.report import shown
from daedal.report.lines import Line, Section
from daedal.report.pictures import Mark, frontier, group, marks

_COLOURS = ("#1f5fa8", "#c2571a", "#4a7d3a", "#7d4a8c", "#8a6100", "#1f7a7a", "#a8325e", "#555555")
_ACROSS = 2


def plot(path: Path, section: Section) -> None:
    """A panel for each place."""
    places = section.places()
    rows = -(-len(places) // _ACROSS)
    figure = Figure(figsize=(6.2 * min(len(places), _ACROSS), 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(places), _ACROSS), squeeze=False).flat
    for place, panel in zip(places, panels, strict=False):
        lines = section.at(place)
        _panel(panel, lines, shown.usual(lines[0]))
        panel.set_title(f"{shown.place(place)} ({place.source})", fontsize=10)
    for panel in list(panels)[len(places) :]:
        panel.remove()
    figure.suptitle(section.name)
    figure.savefig(path, dpi=150)


def _panel(panel: Axes, lines: Sequence[Line], resource: str) -> None:
    found = marks(lines, resource)
    measure = lines[0].quality.measure
    best = frontier(found)
    panel.plot(*_points(best, measure.higher_is_better), color="#999999", linewidth=5, alpha=0.35)
    for name in dict.fromkeys(group(mark.line) for mark in found):
        members = sorted((mark for mark in found if group(mark.line) == name), key=lambda mark: mark.x[0])
        points = _points(members, measure.higher_is_better)
        wide = [[abs(mark.x[0] - mark.x[end]) for mark in members] for end in (1, 2)]
        high = [[abs(mark.y[0] - mark.y[end]) for mark in members] for end in (1, 2)]
        panel.errorbar(*points, xerr=wide, yerr=high, fmt="o-", color=_COLOURS[members[0].colour], capsize=2)
    for mark, x, y in zip(found, *_points(found, measure.higher_is_better), strict=True):
        panel.annotate(mark.line.model, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    panel.set(xscale="log", ylabel=measure.name)
    panel.set_xlabel(f"{shown.heading(resource)}, {shown.unit(resource)} per {measure.amount}")
    panel.grid(alpha=0.25)
    if not measure.higher_is_better:
        panel.invert_yaxis()


def _points(found: Sequence[Mark], higher_is_better: bool) -> tuple[list[float], list[float]]:
    sign = 1 if higher_is_better else -1
    return [mark.x[0] for mark in found], [sign * mark.y[0] for mark in found]
