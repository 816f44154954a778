"""Models as a report finds them: recorded answers, the configuration beside them, and what `daedal bench` measured.

All of a model lies in one directory; every file that is read is named with its checksum. A model without recorded
answers is no subject: nothing about it could be said beside its quality. Loads no weights and no torch.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from daedal.config import ModelConfig
from daedal.cost import formats
from daedal.errors import DaedalError, DataError
from daedal.eval.records import ITEMS, REPLIES, RUN, WINDOWS, ItemRecord, Records, ReplyRecord, WindowRecord, is_run
from daedal.report.benches import BENCH, Bench, read_bench
from daedal.text.files import read_optional

CONFIG, EVALUATION = "config.json", "report.json"
CHECKPOINT = "checkpoint"  # of `daedal eval`: weights that are not packed


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One model that has answered something. weights: the format it answered in, as the planner calls it. checkpoint:
    the checksum of the model that answered. files: of all that was read, by path. bench: None where nothing usable was
    measured, `unmeasured` says why.
    """

    name: str
    family: str | None
    config: ModelConfig
    weights: str
    checkpoint: str
    items: Mapping[str, ItemRecord]
    windows: Mapping[str, WindowRecord]
    replies: Mapping[str, ReplyRecord]
    files: Mapping[str, str]
    bench: Bench | None
    unmeasured: str | None

    def __post_init__(self) -> None:
        if not (self.items or self.windows or self.replies):
            raise DataError(
                f"{self.name} has no answers on record, so its cost stands beside no quality: run `daedal eval` with "
                "--out first"
            )


Find = Callable[[str], ModelConfig]


def read_subject(argument: str, *, find: Find) -> Subject:
    """The model of one argument, `DIR` or `FAMILY=DIR`. find: reads a configuration by the name of a model.

    DataError where the directory holds no answers, or nobody can tell whose they are.
    """
    family, sign, place = argument.partition("=")
    if not sign or Path(argument).is_dir():
        family, place = "", argument
    directory = Path(place)
    if not is_run(directory):
        raise DataError(
            f"{place} holds no recorded answers, and no cost is shown without the quality it bought: run `daedal eval "
            f"{place} --out DIR` and name DIR"
        )
    run, records = read_optional(directory / RUN), Records.open(directory)
    weights = str(run.get("weights", CHECKPOINT))
    evaluation = read_optional(directory / EVALUATION)
    config = _config(directory, evaluation, find)
    bench, unmeasured = _bench(directory, evaluation, weights)
    return Subject(
        name=directory.resolve().name,
        family=family or None,
        config=config,
        weights=_format(weights, run.get("dtype")),
        checkpoint=str(run.get("model", "unknown")),
        items=records.items,
        windows=records.windows,
        replies=records.replies,
        files=_checksums(directory),
        bench=bench,
        unmeasured=unmeasured,
    )


def _format(weights: str, dtype: object) -> str:
    """What weights are held in, as the planner calls it: packed, cast when they were loaded, or as published."""
    if weights != CHECKPOINT:
        return weights
    return "bf16" if dtype == "bfloat16" else formats.SHIPPED


def _config(directory: Path, evaluation: Mapping[str, object], find: Find) -> ModelConfig:
    if (directory / CONFIG).is_file():
        return ModelConfig.read(directory)
    named = evaluation.get("model")
    if not isinstance(named, str):
        raise DataError(
            f"{directory} has no {CONFIG}, so nothing can be counted: copy the model's beside {RUN}, or evaluate again"
        )
    return find(named)


def _bench(directory: Path, evaluation: Mapping[str, object], weights: str) -> tuple[Bench | None, str | None]:
    if not (directory / BENCH).is_file():
        return None, None
    try:
        bench = read_bench(directory / BENCH)
    except DaedalError as error:
        return None, str(error)
    answered = Path(str(evaluation.get("model", bench.model))).name
    if answered != bench.model:
        return None, f"{BENCH} is of {bench.model} and the answers are of {answered}: measure the model that answered"
    if (bench.weights or CHECKPOINT) != weights:
        return None, (
            f"{BENCH} measured weights in {bench.weights or 'the checkpoint’s format'} and the answers were given with "
            f"{weights}: measure and evaluate with the same --weights"
        )
    return bench, None


def _checksums(directory: Path) -> dict[str, str]:
    names = (RUN, ITEMS, REPLIES, WINDOWS, CONFIG, BENCH)
    return {name: sha256(directory / name) for name in names if (directory / name).is_file()}


def sha256(path: Path) -> str:
    """The file's checksum as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
