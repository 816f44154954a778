"""A report as files: the page for people, and the numbers as JSON for machines, from the same lines."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from daedal.errors import ConfigError
from daedal.report.lines import Line, Report, Section
from daedal.report.page import page

PAGE, NUMBERS = "report.html", "costs.json"


def write_report(directory: Path, report: Report) -> list[Path]:
    """Writes both files, and names them. ConfigError where that fails."""
    written = [directory / PAGE, directory / NUMBERS]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written[0].write_text(page(report), encoding="utf-8")
        written[1].write_text(json.dumps(numbers(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written ({error}): choose another --out") from error
    return written


def numbers(report: Report) -> dict[str, Any]:
    """Everything as one JSON object. Costs are of one item, byte, correct answer or bit; null is what is not known."""
    return {
        "inputs": [asdict(one) for one in report.inputs],
        "sources": dict(report.sources),
        "workloads": [_section(section) for section in report.sections],
        "left_out": list(report.left_out),
        "notes": list(report.notes),
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "workload": section.name,
        "groups": list(section.groups),
        "measure": section.measure.name,
        "references": list(section.references),
        "amount": section.measure.amount,
        "gain": section.measure.gain,
        "lines": [_line(line) for line in section.lines],
        "equal_quality": [asdict(one) for one in section.equal],
        "notes": list(section.notes),
    }


def _line(line: Line) -> dict[str, Any]:
    quality = line.quality
    return {
        "model": line.model,
        "family": line.family,
        "quality": {
            "measure": quality.measure.name,
            **asdict(quality.value),
            "units": quality.units,
            "amount": quality.amount,
            "gains": quality.gains,
            "chance": quality.chance,
            "groups": {name: asdict(figure) for name, figure in quality.groups.items()},
        },
        **asdict(line.place),
        "off": asdict(line.off),
        "price": line.price,
        "energy": line.energy,
        "costs": {name: asdict(cost) for name, cost in line.costs.items()},
    }
