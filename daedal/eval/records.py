"""What a model said to each item, window and problem, as rows that other work can compare item by item.

Rows are JSON lines, written as soon as they are known: whoever stops a run loses the batch at hand at most. A directory
of rows belongs to one model, run in one way; rows are found again by the key of what was asked. Knows no models.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from daedal.errors import DataError

Norm = Literal["none", "chars", "bytes"]
NORMS: tuple[Norm, ...] = ("none", "chars", "bytes")

ITEMS, WINDOWS, REPLIES, RUN = "items.jsonl", "windows.jsonl", "replies.jsonl", "run.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemRecord:
    """One item and, for each of its choices in order, what the model gave it.

    logprobs: natural, of the whole continuation. greedy: whether the model itself would have gone on so. chars and
    num_bytes: of the continuation without the space before it, as lm-evaluation-harness measures choices. fed: tokens
    that the model reads to weigh each choice, its context among them, of which all have the first `shared` in common;
    empty in records older than these fields.
    """

    key: str
    task: str
    doc_id: int
    gold: int
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]
    chars: tuple[int, ...]
    num_bytes: tuple[int, ...]
    fed: tuple[int, ...] = ()
    shared: int = 0

    def predicted(self, norm: Norm = "none") -> int:
        """The choice of the highest log-probability, by `norm` for each character or byte; the first of equals."""
        lengths = {"none": (1,) * len(self.logprobs), "chars": self.chars, "bytes": self.num_bytes}[norm]
        scores = [logprob / max(length, 1) for logprob, length in zip(self.logprobs, lengths, strict=True)]
        return max(range(len(scores)), key=scores.__getitem__)

    def correct(self, norm: Norm = "none") -> bool:
        """Whether the right choice is predicted; without choices, whether the model would have gone on so itself."""
        return self.predicted(norm) == self.gold if len(self.logprobs) > 1 else self.greedy[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRecord:
    """One window of a text and the nats spent on `tokens` tokens of it, which are `num_bytes` bytes."""

    key: str
    kind: str
    context: int
    nats: float
    tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyRecord:
    """One problem and what the model wrote. found: of that, what counts as its answer, None where nothing does.

    prompt_tokens, tokens: read and written. finish_reason: "length" where the reply was cut off. The rest as `Spent`
    has it, of this reply in its batch; energy_source: what joules rest on.
    """

    key: str
    task: str
    doc_id: int
    answer: str
    text: str
    found: str | None
    right: bool
    prompt_tokens: int
    tokens: int
    finish_reason: str
    flops: float
    kv_byte_seconds: float
    device_seconds: float
    joules: float | None
    energy_source: str | None


class Records:
    """Rows by key. directory: where they are kept; None keeps them in memory alone.

    identity: of the model and the way it is run, and what else must be the same for rows to go together. DataError
    where the directory holds rows of another.
    """

    def __init__(self, directory: Path | None = None, identity: Mapping[str, object] | None = None):
        self.items: dict[str, ItemRecord] = {}
        self.windows: dict[str, WindowRecord] = {}
        self.replies: dict[str, ReplyRecord] = {}
        self._directory = directory
        if directory is not None:
            _claim(directory, dict(identity or {}))
            self._read(directory)

    @classmethod
    def open(cls, directory: Path) -> "Records":
        """What a finished or stopped run has left, whoever made it; nothing is written."""
        if not is_run(directory):
            raise DataError(f"{directory} has no {RUN}, so it holds no results: name one that was given as --out")
        records = cls()
        records._read(directory)
        return records

    def add(self, rows: Iterable[ItemRecord | WindowRecord | ReplyRecord]) -> None:
        """Keeps rows, on the disk first."""
        rows = list(rows)
        for name, kind, held in self._files():
            new = [row for row in rows if isinstance(row, kind)]
            if self._directory is not None and new:
                with (self._directory / name).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in new)
            held.update((row.key, row) for row in new)

    def _files(self) -> tuple[tuple[str, type[Any], dict[str, Any]], ...]:
        return (
            (ITEMS, ItemRecord, self.items),
            (WINDOWS, WindowRecord, self.windows),
            (REPLIES, ReplyRecord, self.replies),
        )

    def _read(self, directory: Path) -> None:
        for name, kind, held in self._files():
            for row in _rows(directory / name, mend=self._directory is not None):
                record = kind(**{field: tuple(x) if isinstance(x, list) else x for field, x in row.items()})
                held[record.key] = record


def is_run(directory: Path) -> bool:
    """Whether the directory holds results."""
    return (directory / RUN).is_file()


def _claim(directory: Path, identity: dict[str, object]) -> None:
    path = directory / RUN
    told = json.loads(json.dumps(identity))
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{RUN}.{os.getpid()}"
        partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in told if held.get(name) != told[name]]
    if other:
        raise DataError(
            f"{directory} holds results of another {' and '.join(other)}: they must not be mixed, give another --out"
        )


def _rows(path: Path, *, mend: bool) -> list[dict[str, Any]]:
    """mend: a last line that was cut short is cut off, so that the next row begins a line."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): remove it, and what it held is computed again") from error
