"""What models were asked, as units of work that cost something and bring something: items of tasks, windows of text.

Models are compared on the items and problems that all of them answered, and on texts of the same kind in windows of as
many tokens. An item brings a correct answer or none; a window brings the bits that knowing the text saves against a
reference. A text counts twice, as work of its own each time: read in as a prompt, and written token by token; what a
model knows of it is the same. Knows no device and no price.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from daedal.errors import DataError
from daedal.eval.records import ItemRecord, ReplyRecord, WindowRecord
from daedal.report.subjects import Subject

_LN2 = 0.6931471805599453


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A kind of quality. amount: what work is counted in. gain: what it brings. million: whether both are shown by the
    million, being small.
    """

    name: str
    higher_is_better: bool
    amount: str
    gain: str
    million: bool


ACCURACY = Measure(name="accuracy", higher_is_better=True, amount="item", gain="correct answer", million=False)
BITS = Measure(name="bits per byte", higher_is_better=False, amount="byte", gain="bit saved", million=True)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Bits that each byte of a text takes without a model. source: the file's checksum, None where no file was read."""

    name: str
    bits_per_byte: float
    source: str | None = None


STORED = Reference(name="the text as it is stored", bits_per_byte=8.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One item or window. group: its task or kind of text. shared: tokens that are read once, endings: tokens read
    after them, one number for each; written: tokens written after those. logits: tokens read of which the head is
    asked. amount: items or bytes. score: correct answers, or bits spent. gain: correct answers, or bits saved. chance:
    what guessing scores. seconds, joules: of the device while it was done, where that was recorded.
    """

    group: str
    shared: int
    endings: tuple[int, ...]
    written: int
    logits: int
    amount: float
    score: float
    gain: float
    chance: float | None = None
    seconds: float | None = None
    joules: float | None = None

    @property
    def read(self) -> int:
        """Tokens read."""
        return self.shared + sum(self.endings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """One model's units of a workload: at least one."""

    subject: Subject
    units: Sequence[Unit]

    def __post_init__(self) -> None:
        if not self.units:
            raise DataError(f"{self.subject.name} did none of this work: evaluate it on the same")


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """The same work of several models. groups: tasks or kinds. left_out: units that not all have done."""

    name: str
    measure: Measure
    groups: tuple[str, ...]
    done: Sequence[Done]
    left_out: int
    references: Mapping[str, Reference] = field(default_factory=dict)


def workloads(subjects: Sequence[Subject], references: Mapping[str, Reference]) -> list[Workload]:
    """What all of them have done: the tasks, and the texts by the length of windows, read and written. DataError where
    they have nothing in common.
    """
    items = [{key: _item(row, one.name) for key, row in one.items.items()} for one in subjects]
    replies = [{key: _reply(row) for key, row in one.replies.items()} for one in subjects]
    found = [*_answers("tasks", subjects, items), *_answers("problems", subjects, replies)]
    found += _texts(subjects, references)
    if not found:
        names = ", ".join(subject.name for subject in subjects)
        raise DataError(
            f"{names} answered nothing in common: run `daedal eval` with the same --tasks or --text for each"
        )
    return found


def _answers(name: str, subjects: Sequence[Subject], units: Sequence[Mapping[str, Unit]]) -> list[Workload]:
    """What all models have answered, by the keys of what was asked."""
    every = [set(mine) for mine in units]
    common = sorted(set.intersection(*every))
    if not common:
        return []
    return [
        Workload(
            name=name,
            measure=ACCURACY,
            groups=tuple(sorted({units[0][key].group for key in common})),
            done=[
                Done(subject=subject, units=[mine[key] for key in common])
                for subject, mine in zip(subjects, units, strict=True)
            ],
            left_out=len(set.union(*every)) - len(common),
        )
    ]


def _reply(row: ReplyRecord) -> Unit:
    """The last token that is written is not read again."""
    return Unit(
        group=row.task,
        shared=0,
        endings=(row.prompt_tokens,),
        written=max(row.tokens - 1, 0),
        logits=1,
        amount=1.0,
        score=float(row.right),
        gain=float(row.right),
        seconds=row.device_seconds,
        joules=row.joules,
    )


def _item(row: ItemRecord, name: str) -> Unit:
    if not row.fed:
        raise DataError(
            f"the answers of {name} do not say how many tokens were read for them: evaluate into a new --out"
        )
    choices = len(row.logprobs)
    return Unit(
        group=row.task,
        shared=row.shared,
        endings=tuple(fed - row.shared for fed in row.fed),
        written=0,
        logits=sum(row.tokens),
        amount=1.0,
        score=float(row.correct()),
        gain=float(row.correct()),
        chance=1 / choices if choices > 1 else 0.0,
    )


def _texts(subjects: Sequence[Subject], references: Mapping[str, Reference]) -> list[Workload]:
    every = [{(row.context, row.kind) for row in subject.windows.values()} for subject in subjects]
    common = set.intersection(*every)
    found = []
    for context in sorted({context for context, _ in common}):
        kinds = tuple(sorted(kind for length, kind in common if length == context))
        known = {kind: references.get(kind, STORED) for kind in kinds}
        for written in (False, True):
            done = [Done(subject=one, units=_windows(one, context, known, written=written)) for one in subjects]
            found.append(
                Workload(
                    name=f"text in windows of {context:,} tokens, {'written' if written else 'read'}",
                    measure=BITS,
                    groups=kinds,
                    done=done,
                    left_out=sum(
                        row.context == context and row.kind not in kinds
                        for subject in subjects
                        for row in subject.windows.values()
                    ),
                    references=known,
                )
            )
    return found


def _windows(subject: Subject, context: int, known: Mapping[str, Reference], *, written: bool) -> list[Unit]:
    rows = [row for row in subject.windows.values() if row.context == context and row.kind in known]
    return [_window(row, known[row.kind], written=written) for row in sorted(rows, key=lambda row: row.key)]


def _window(row: WindowRecord, reference: Reference, *, written: bool) -> Unit:
    bits = row.nats / _LN2
    return Unit(
        group=row.kind,
        shared=0,
        endings=() if written else (row.tokens,),
        written=row.tokens if written else 0,
        logits=0 if written else 1,
        amount=float(row.num_bytes),
        score=bits,
        gain=reference.bits_per_byte * row.num_bytes - bits,
    )
