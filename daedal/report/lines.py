"""The lines of a report: a cost always beside the quality that it bought.

There is no type here that holds a cost or a speed without its `Quality`, and pages, pictures and tables take lines
alone: what was not evaluated cannot be shown. Knows how nothing was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from daedal.errors import DataError
from daedal.report.redraws import Figure
from daedal.report.settings import Off, Place
from daedal.report.workloads import Measure

DOLLARS, JOULES, FLOPS, BYTE_SECONDS, SECONDS = "dollars", "joules", "flops", "byte_seconds", "seconds"
RESOURCES = (DOLLARS, JOULES, FLOPS, BYTE_SECONDS, SECONDS)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What some work was worth. units: items or windows, at least one. value: correct answers of all, or bits per byte.
    gains: correct answers, or bits saved. chance: what guessing scores, None where there is nothing to guess. groups:
    the value of each task or kind of text.
    """

    measure: Measure
    units: int
    amount: float
    gains: float
    value: Figure
    chance: float | None
    groups: Mapping[str, Figure]

    def __post_init__(self) -> None:
        if self.units < 1 or self.value.value is None:
            raise DataError("a quality is of no units: evaluate the model first")

    @property
    def guesses(self) -> bool:
        """Whether it is no better than guessing, as far as the interval tells."""
        low = self.value.value if self.value.low is None else self.value.low
        return bool(self.chance) and low is not None and low <= (self.chance or 0.0)

    @property
    def goodness(self) -> float:
        """The value, turned so that more is better."""
        assert self.value.value is not None
        return self.value.value if self.measure.higher_is_better else -self.value.value


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one resource: for an item or a byte, and for what was gained. beside: per gain, over that of the first model
    in the same place; None for the first itself.
    """

    per_amount: Figure
    per_gain: Figure
    beside: Figure | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model's work in one place. costs: by resource, those that are known. price, energy: where they are from."""

    model: str
    family: str | None
    quality: Quality
    place: Place
    off: Off
    costs: Mapping[str, Cost]
    price: str | None
    energy: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.quality, Quality):
            raise DataError(f"a cost of {self.model} stands beside no quality: evaluate the model first")


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Two families in one place, at the quality of one of their models: what an item or a byte costs, for a resource.
    ratio: the base's cost over the other's, above 1 where the other is cheaper. why: a sentence in place of figures.
    """

    base: str
    other: str
    place: Place
    resource: str
    at: str | None = None
    quality: float | None = None
    base_cost: float | None = None
    other_cost: float | None = None
    ratio: Figure | None = None
    why: str | None = None

    def __post_init__(self) -> None:
        if self.why is None and (self.quality is None or self.ratio is None):
            raise DataError(f"costs of {self.base} and {self.other} stand beside no quality: evaluate them first")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One workload. lines: of every place in turn, models in their order. left_out, notes: sentences."""

    name: str
    measure: Measure
    groups: Sequence[str]
    references: Sequence[str]
    lines: Sequence[Line]
    equal: Sequence[Equal]
    notes: Sequence[str] = field(default_factory=tuple)

    def places(self) -> list[Place]:
        """In the order of their lines."""
        return list(dict.fromkeys(line.place for line in self.lines))

    def at(self, place: Place) -> list[Line]:
        """The lines of one place."""
        return [line for line in self.lines if line.place == place]


@dataclass(frozen=True, kw_only=True)
class Input:
    """A model that was read. files: checksums by name."""

    name: str
    family: str | None
    weights: str
    checkpoint: str
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it. left_out, notes: sentences. sources: what else was read, with its version or checksum."""

    inputs: Sequence[Input]
    sections: Sequence[Section]
    left_out: Sequence[str]
    notes: Sequence[str]
    sources: Mapping[str, str]
