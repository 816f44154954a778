"""The tables of `daedal report`: a row for each model in each place, always with its quality. Knows lines alone."""

from rich import box
from rich.table import Table

from daedal.report import shown
from daedal.report.lines import RESOURCES, Line, Section


def section_table(section: Section) -> Table:
    """Of one workload."""
    measure = section.measure
    known = [name for name in RESOURCES if any(name in line.costs for line in section.lines)]
    title = f"{section.name}: costs per {shown.per(measure, gain=True)}, dollars by the million"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("where", "", "model"):
        table.add_column(heading)
    table.add_column(measure.name, justify="right")
    for name in known:
        table.add_column(shown.heading(name), justify="right")
    for place in section.places():
        for line in section.at(place):
            table.add_row(shown.place(place), place.source, line.model, _quality(line), *_costs(line, known))
        table.add_section()
    return table


def _quality(line: Line) -> str:
    interval = shown.quality_interval(line.quality)
    return shown.quality(line.quality) + (f" ({interval})" if interval else "")


def _costs(line: Line, known: list[str]) -> list[str]:
    measure = line.quality.measure
    return [
        shown.cost(name, line.costs[name].per_gain.value, measure) if name in line.costs else shown.ABSENT
        for name in known
    ]
