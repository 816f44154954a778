"""How a student is healed, and what came of it: settings, results, and the receipt that lies beside a healed student.

Knows no models.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from daedal.distill.atomic import write_text
from daedal.distill.budget import Budget, Course
from daedal.distill.losses import Gate
from daedal.distill.permission import Permission
from daedal.distill.training import Point
from daedal.errors import ConfigError
from daedal.train.bounds import number, whole

RECEIPT, WORK = "healing.json", ".healing"


@dataclass(frozen=True, kw_only=True)
class Healing:
    """How a student is healed. minutes, tokens: the budget, one of the two.

    name: of the student in its provenance; "" is that of its directory. trained: roles of what moves, see
    `student.ALL`. share: of the original in the loss, the rest is the true token's; gate: how it falls where the
    original finds that unlikely. rate, warmup, floor: see `Course`. context: tokens of a window; samples: windows of a
    step; long_context: tokens of a share `long_share` of them, in whole hundredths, None for none. bias_speed: of
    experts' correction biases. held_out: files to measure on; without them a share `validation` of the text's documents
    is held out for it. evaluate_context, evaluate_tokens: windows that are measured, and how many tokens in all;
    evaluations: how often on the way. precision: what is computed in. saved_dtype: of what is written; None is that of
    the student's files.
    permission: where the terms of the original's licence do not permit learning from it.
    """

    name: str = ""
    minutes: float | None = None
    tokens: int | None = None
    trained: tuple[str, ...] = ("attention", "norm")
    share: float = 0.7
    gate: Gate | None = None
    rate: float = 1e-4
    warmup: float = 0.02
    floor: float = 0.05
    clip: float = 1.0
    context: int = 256
    samples: int = 4
    long_context: int | None = None
    long_share: float = 0.05
    bias_speed: float = 0.0
    held_out: tuple[Path, ...] = ()
    validation: float = 0.05
    evaluate_context: int = 1024
    evaluate_tokens: int = 8192
    evaluations: int = 6
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    saved_dtype: Literal["bfloat16", "float32"] | None = None
    permission: Permission | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Budget(minutes=self.minutes, tokens=self.tokens)
        Course(rate=self.rate, warmup=self.warmup, floor=self.floor)
        number("share", self.share, low=0.0, high=1.0)
        number("validation", self.validation, low=0.0, high=0.5, above=not self.held_out)
        number("bias_speed", self.bias_speed, low=0.0, high=1.0)
        number("long_share", self.long_share, low=0.0, high=1.0)
        if self.long_context is not None:
            whole("long_context", self.long_context, low=2)
        for name in ("context", "samples", "evaluate_context", "evaluate_tokens"):
            whole(name, getattr(self, name), low=2 if name == "context" else 1)
        whole("evaluations", self.evaluations, low=1)
        whole("seed", self.seed, low=0)

    @property
    def budget(self) -> Budget:
        return Budget(minutes=self.minutes, tokens=self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest window that is learnt from."""
        return max(self.context, self.long_context or 0)

    def record(self) -> dict[str, Any]:
        """As JSON, without what changes nothing of the result."""
        plain = asdict(self) | {"held_out": [path.name for path in self.held_out]}
        return {name: value for name, value in plain.items() if name != "permission"}


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What came of it. before, after: measured, the latter as it was written; curve: from before the first step to the
    last, as it was trained."""

    directory: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    curve: tuple[Point, ...] = field(repr=False)
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "curve": [point.record() for point in self.curve],
        }


def finished(destination: Path, identity: Mapping[str, Any]) -> Healed | None:
    """The result of the same healing, if it lies there. ConfigError where something else does."""
    receipt = destination / RECEIPT
    if not receipt.is_file():
        if (destination / "config.json").is_file() and not destination.with_name(destination.name + WORK).is_dir():
            raise ConfigError(f"{destination} holds a checkpoint already: name another place, or remove it")
        return None
    found = json.loads(receipt.read_text(encoding="utf-8"))
    differing = [name for name, value in identity.items() if found["identity"].get(name) != value]
    if differing:
        raise ConfigError(
            f"{destination} was healed with another {', '.join(differing)}: name another place, or remove it"
        )
    curve = tuple(
        Point(step=row.pop("step"), tokens=row.pop("tokens"), seconds=row.pop("seconds"), measured=row)
        for row in found["curve"]
    )
    return Healed(
        directory=destination,
        before=found["before"],
        after=found["after"],
        curve=curve,
        tokens=found["tokens"],
        seconds=found["seconds"],
    )


def write_receipt(healed: Healed, identity: Mapping[str, Any]) -> None:
    """Beside the healed student, last of all: from then on it is done."""
    receipt = json.dumps({"identity": identity, **healed.record()}, indent=1) + "\n"
    write_text(healed.directory / RECEIPT, receipt)
