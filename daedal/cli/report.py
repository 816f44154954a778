"""`daedal report`: what a correct answer cost, from answers that `daedal eval` kept and speeds of `daedal bench`.

Reads directories and no weights, and loads no torch. What is counted, predicted and compared is the business of
`daedal.report`; here it is chosen, shown and written.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.cli import cost_arguments
from daedal.cli.console import table_console
from daedal.cli.cost import read_config
from daedal.cli.opening import say
from daedal.cost import hardware, prices
from daedal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from daedal.report.assembly import Hardware
    from daedal.report.lines import Report
    from daedal.report.subjects import Subject
    from daedal.report.workloads import Reference


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[FAMILY=]DIR...", help="What `daedal eval --out` kept of each, and `daedal bench --out`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for report.html, costs.json and the pictures.")] = Path("report"),
    hardware: Annotated[
        str, typer.Option(help="Predict for these: this,h200,8xascend-910c.", show_default=True)
    ] = "this,h200",
    batch: Annotated[str, typer.Option(help="Sequences computed together, one or more: 1,64.")] = "1",
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="[KIND=]FILE", help="The evaluated text, for xz to be the reference of bits saved."),
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="Your own prices, a TOML file, over the known ones.")] = None,
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")] = False,
) -> None:
    """Report what a correct answer cost, in money, energy, compute and memory, beside the quality it bought."""
    from daedal.report.written import numbers, write_report

    report = _report(models, hardware, batch, text or (), prices)
    written = write_report(out, report)
    written += _pictures(out, report)
    _show(report)
    say(f"written: {', '.join(str(path) for path in written)}")
    if json_line:
        print(json.dumps({"out": str(out), **numbers(report)}))


def _report(models: Sequence[str], devices: str, batch: str, texts: Sequence[str], own: Path | None) -> "Report":
    from daedal.report.assembly import Asked, assemble

    chips, refused = _chips(devices)
    batches = cost_arguments.batches(batch)
    subjects, without = _subjects(models)
    return assemble(
        subjects,
        Asked(
            hardware=chips,
            batches=batches,
            prices=prices.read(own),
            references=dict(_reference(given) for given in texts),
            left_out=[*without, *refused],
        ),
    )


def _subjects(models: Sequence[str]) -> "tuple[list[Subject], list[str]]":
    """Models with answers, and why the others have none; an error where no model has any."""
    from daedal.report.subjects import read_subject

    found, without = [], []
    for argument in models:
        try:
            found.append(read_subject(argument, find=read_config))
        except DataError as error:
            without.append(str(error))
    if not found:
        raise DataError(without[0])
    return found, without


def _chips(text: str) -> "tuple[list[Hardware], list[str]]":
    """What is known, and why this machine is not: a name that nobody knows is an error."""
    from daedal.report.assembly import Hardware

    found, refused = [], []
    for devices in cost_arguments.hardware(text):
        try:
            found.append(Hardware(name=devices.chip, chip=hardware.read(devices.chip), devices=devices.number))
        except ConfigError as error:
            if devices.chip != hardware.THIS:
                raise
            refused.append(f"nothing is predicted for this machine: {error}")
    return found, refused


def _reference(given: str) -> "tuple[str, Reference]":
    """KIND=FILE, or a file that is called by its own name without endings, as `daedal eval` has it."""
    from daedal.report.references import compressed

    kind, sign, name = given.partition("=")
    if not sign or Path(given).is_file():
        return Path(given).name.split(".")[0], compressed(Path(given))
    if not kind or not name:
        raise ConfigError(f"--text is {given!r}: write it as KIND=FILE, such as prose=novel.txt")
    return kind, compressed(Path(name))


def _pictures(out: Path, report: "Report") -> list[Path]:
    if find_spec("matplotlib") is None:
        say("no PNG files: they need matplotlib, which comes with daedal[plots]")
        return []
    from daedal.report.plots import plot

    paths = []
    for number, section in enumerate(report.sections, 1):
        paths.append(out / f"frontier_{number}.png")
        plot(paths[-1], section)
    return paths


def _show(report: "Report") -> None:
    from daedal.cli.report_tables import section_table
    from daedal.report.page import headlines

    console = table_console()
    for section in report.sections:
        console.print(section_table(section))
        for sentence in (*headlines(section), *section.notes):
            console.print(sentence)
    for sentence in (*report.left_out, *report.notes):
        say(sentence)
