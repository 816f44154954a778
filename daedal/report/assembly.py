"""A whole report from models, hardware and prices: every workload in every place, and what had to be left out, said.

What cannot be shown never stops the rest: it is named in a sentence. Writes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from daedal.cost import work
from daedal.cost.hardware import Chip
from daedal.cost.plan import NOT_MODELLED
from daedal.cost.prices import Prices
from daedal.cost.work import Model
from daedal.errors import DataError
from daedal.report.costing import Drawn, lines_of
from daedal.report.equal_quality import equal_quality
from daedal.report.lines import DOLLARS, JOULES, RESOURCES, Input, Line, Report, Section
from daedal.report.settings import COUNTS, PREDICTED, Contexts, Off, Setting, measured, predicted, recorded
from daedal.report.subjects import Subject
from daedal.report.workloads import Done, Reference, Workload, workloads

MOST_MODELS = 64


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """So many of a chip, to predict for."""

    name: str
    chip: Chip
    devices: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a report is to show. references: by kind of text. left_out: what is known already not to be there."""

    hardware: Sequence[Hardware]
    batches: Sequence[int]
    prices: Prices
    references: Mapping[str, Reference]
    left_out: Sequence[str] = ()


def assemble(subjects: Sequence[Subject], asked: Asked) -> Report:
    """DataError where the models have done nothing in common, or two have one name."""
    _check(subjects)
    left_out = list(asked.left_out)
    left_out += [f"{one.name} was not measured here: {one.unmeasured}" for one in subjects if one.unmeasured]
    planned = {subject.name: _planned(subject) for subject in subjects}
    sections = []
    for workload in workloads(subjects, asked.references):
        section, missing = _section(workload, planned, asked)
        sections.append(section)
        left_out += missing
    return Report(
        inputs=[
            Input(
                name=one.name, family=one.family, weights=one.weights, checkpoint=one.checkpoint, files=dict(one.files)
            )
            for one in subjects
        ],
        sections=sections,
        left_out=list(dict.fromkeys(left_out)),
        notes=_notes([line for section in sections for line in section.lines], asked),
        sources={
            "prices": asked.prices.version,
            **{one.chip.name: f"{one.chip.source} ({one.chip.date}, {one.chip.certainty})" for one in asked.hardware},
            **{one.name: one.source for one in asked.references.values() if one.source is not None},
        },
    )


def _check(subjects: Sequence[Subject]) -> None:
    if not 1 <= len(subjects) <= MOST_MODELS:
        raise DataError(f"{len(subjects)} models are to be reported on: give 1 to {MOST_MODELS}")
    names = [subject.name for subject in subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two directories are called {twice}: rename one, models go by the name of their directory")


def _planned(subject: Subject) -> Model:
    return work.model(subject.config, weights=subject.weights)


def _section(workload: Workload, planned: Mapping[str, Model], asked: Asked) -> tuple[Section, list[str]]:
    left_out: list[str] = []
    lines: list[Line] = []
    equal = []
    for group in _places(workload, planned, asked, left_out):
        done = [one for one, _ in group]
        drawn: list[Drawn] = lines_of(done, [setting for _, setting in group], workload.measure)
        lines += [one.line for one in drawn]
        for resource in RESOURCES:
            equal += equal_quality(drawn, resource)
    section = Section(
        name=workload.name,
        measure=workload.measure,
        groups=workload.groups,
        references=[
            f"{kind}: {reference.name}, {reference.bits_per_byte:.4f} bits per byte"
            for kind, reference in workload.references.items()
        ],
        lines=lines,
        equal=equal,
        notes=_section_notes(workload, lines),
    )
    return section, left_out


def _places(
    workload: Workload, planned: Mapping[str, Model], asked: Asked, left_out: list[str]
) -> Iterator[list[tuple[Done, Setting]]]:
    """The models that could be costed in each place, what was counted first; none is empty."""
    contexts = {one.subject.name: Contexts.of(one.units) for one in workload.done}
    counted = Setting(place=COUNTS, off=Off(), read=None, written=None, price=None, energy=None)
    yield [(one, counted) for one in workload.done]
    answered = [(one, recorded(one.units, energy=_energy(one), prices=asked.prices)) for one in workload.done]
    if kept := [(one, setting) for one, setting in answered if setting is not None]:
        yield kept
    batches = sorted({batch for one in workload.done if one.subject.bench for batch in one.subject.bench.batches})
    for batch in batches:
        found = {
            one.subject.name: measured(
                one.subject.bench,
                planned[one.subject.name],
                contexts[one.subject.name],
                batch=batch,
                prices=asked.prices,
            )
            for one in workload.done
            if one.subject.bench is not None
        }
        yield from _kept(workload, found, f"measured here at batch {batch}", left_out)
    for hardware in asked.hardware:
        for batch in asked.batches:
            found = {
                one.subject.name: predicted(
                    planned[one.subject.name],
                    hardware.chip,
                    contexts[one.subject.name],
                    name=hardware.name,
                    devices=hardware.devices,
                    batch=batch,
                    prices=asked.prices,
                )
                for one in workload.done
            }
            some = hardware.name if hardware.devices == 1 else f"{hardware.devices}x{hardware.name}"
            yield from _kept(workload, found, f"predicted for {some} at batch {batch}", left_out)


def _energy(done: Done) -> str | None:
    """Where the joules of replies are from, as they say themselves."""
    return next((row.energy_source for row in done.subject.replies.values()), None)


def _kept(
    workload: Workload, found: Mapping[str, Setting | str], where: str, left_out: list[str]
) -> Iterator[list[tuple[Done, Setting]]]:
    kept = []
    for one in workload.done:
        setting = found.get(one.subject.name)
        if isinstance(setting, str):
            left_out.append(f"{one.subject.name}, {workload.name}, {where}: {setting}")
        elif setting is not None:
            kept.append((one, setting))
    if kept:
        yield kept


def _section_notes(workload: Workload, lines: Sequence[Line]) -> list[str]:
    notes = []
    if workload.left_out:
        what = "items" if workload.measure.higher_is_better else "windows"
        notes.append(f"left out, because not every model has done them: {workload.left_out:,} {what}")
    for line in {line.model: line for line in lines}.values():
        quality = line.quality
        if quality.guesses:
            notes.append(
                f"{line.model} is no better than guessing, which scores {quality.chance:.1%}: what its correct answers "
                "cost says nothing of what it knows"
            )
    notes += dict.fromkeys(
        f"{line.model}: {cost.per_gain.why}"
        for line in lines
        for cost in line.costs.values()
        if cost.per_gain.why is not None
    )
    return notes


def _notes(lines: Sequence[Line], asked: Asked) -> list[str]:
    """What has to be said of all sections."""
    placed = [line for line in lines if line.place != COUNTS]
    unpriced = dict.fromkeys(line.place.devices for line in placed if DOLLARS not in line.costs)
    unpowered = dict.fromkeys(line.place.devices for line in placed if JOULES not in line.costs)
    notes = []
    if unpriced:
        notes.append(f"no price is known for {', '.join(unpriced)}, so no dollars: give one with --prices FILE")
    if unpowered:
        notes.append(f"no power is known for {', '.join(unpowered)}, so no joules")
    upper = [one.name for one in asked.hardware if one.chip.watts_peak is not None and one.chip.watts_idle is None]
    if upper:
        notes.append(
            f"the idle power of {', '.join(upper)} is not known, so joules there count peak power throughout: an upper "
            "estimate, not to be held against hardware whose idle power is known"
        )
    if any(line.place.source == PREDICTED for line in placed):
        notes.append(f"predictions do not model: {'; '.join(NOT_MODELLED)}")
    doubtful = [one for one in asked.hardware if one.chip.certainty not in ("datasheet", "measured")]
    if doubtful:
        told = ", ".join(f"{one.name} {one.chip.certainty}" for one in doubtful)
        notes.append(f"figures of chips that are not the maker's final ones: {told}")
    return notes
