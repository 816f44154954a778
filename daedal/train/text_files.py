"""Rows of text out of one file: plain text or JSON lines, as they are or compressed, or Parquet. A row of the last two
without the column of text may be a conversation, in the column `messages`.

Everything streams: a piece of one file is in memory, never the file. Whatever cannot be text (NUL bytes, invalid UTF-8,
a lone surrogate, another type) ends in one sentence that names the file and the row, as does a damaged or empty file.
Knows nothing of sources, licences or tokens.
"""

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from daedal.errors import DataError

parquet: ModuleType | None = None
with suppress(ModuleNotFoundError):
    parquet = import_module("pyarrow.parquet")

MAX_ROW_BYTES = 2**28
TEXT, JSON_LINES, PARQUET = ".txt", ".jsonl", ".parquet"
MESSAGES = "messages"
Messages = Sequence[Mapping[str, str]]
_PARQUET_ROWS = 256  # at a time
_PROGRESS_BYTES = 2**18  # unpacked, between two calls
_OPENERS: Mapping[str, Callable[[BinaryIO], object]] = {".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (*(kind + packed for kind in (TEXT, JSON_LINES) for packed in ("", *_OPENERS)), PARQUET)
"""Endings of the files that can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One text. number: of its first line, or of its row, from 1. fields: the other columns that were asked for.

    messages: of a conversation, each with `role` and `content`; its text is what they say, one after the other.
    """

    number: int
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)
    messages: Messages | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file is read. column: of the text. others: columns to hand on. document_chars: where plain text is cut.

    consumed: called with the bytes of the file that are behind.
    """

    column: str
    others: Sequence[str]
    document_chars: int
    consumed: Callable[[int], None]


def suffix(path: Path) -> str | None:
    """Which of SUFFIXES the name ends in, None where it is another kind of file."""
    return next((known for known in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(known)), None)


def read_rows(path: Path, how: Reading) -> Iterator[Row]:
    """Every row of the file in order; DataError where it has none that holds text, or one that is not text."""
    ending = suffix(path)
    assert ending is not None
    readers = {TEXT: _text_rows, JSON_LINES: _json_rows, PARQUET: _parquet_rows}
    reader = next(reader for kind, reader in readers.items() if ending.startswith(kind))
    some = False
    with reading(path):
        for row in reader(path, how):
            some = some or bool(row.text)
            yield row
    if not some:
        raise DataError(f"{path} holds no text, every file must hold some: remove it from the sources")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a file's medium or its compression refuses into a DataError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the file and its permissions") from (
            error
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file unpacked, and the file itself, whose place says how much of it is behind."""
    opener = _OPENERS.get(path.suffix)
    with path.open("rb") as raw:
        if opener is None:
            yield raw, raw
        else:
            with cast(BinaryIO, opener(raw)) as stream:
                yield stream, raw


def _lines(path: Path, limit: int, consumed: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Number and text of each line, line break and all; a line of more than `limit` bytes comes in several pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, start, unreported = 1, True, 0
    with _opened(path) as (stream, raw):
        while piece := stream.readline(limit):
            ends = piece.endswith(b"\n")
            if b"\0" in piece:
                raise DataError(f"{path}, line {number}, holds a NUL byte: it is binary or not UTF-8, give text")
            yield number, _decoded(decoder, piece, ends, path, number).removeprefix("\ufeff" if start else "")
            number += ends
            start = False
            unreported += len(piece)
            if unreported >= _PROGRESS_BYTES:
                consumed(raw.tell())
                unreported = 0
    _decoded(decoder, b"", True, path, number)


def _decoded(decoder: codecs.IncrementalDecoder, piece: bytes, final: bool, path: Path, line: int) -> str:
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {line}, is not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def _text_rows(path: Path, how: Reading) -> Iterator[Row]:
    """A document ends at the first blank line after `document_chars` characters, or where a line ends after twice as
    many. Only a line of more than `document_chars` bytes can be cut in its middle.
    """
    pieces: list[str] = []
    size, first = 0, 1
    for number, line in _lines(path, how.document_chars, how.consumed):
        first = first if pieces else number
        pieces.append(line)
        size += len(line)
        if (size >= how.document_chars and not line.strip()) or size >= 2 * how.document_chars:
            yield from _unless_blank(first, pieces)
            pieces, size = [], 0
    yield from _unless_blank(first, pieces)


def _unless_blank(number: int, pieces: Sequence[str]) -> Iterator[Row]:
    text = "".join(pieces)
    if text.strip():
        yield Row(number=number, text=text)


def _json_rows(path: Path, how: Reading) -> Iterator[Row]:
    for number, line in _lines(path, MAX_ROW_BYTES, how.consumed):
        place = f"{path}, line {number},"
        if not line.strip():
            continue
        if not line.endswith("\n") and len(line.encode()) >= MAX_ROW_BYTES:
            raise DataError(f"{place} has more than {MAX_ROW_BYTES} bytes, no row may be so long: cut it into several")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not JSON ({error}): give one object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{place} holds a JSON {type(value).__name__}: give one object a line")
        yield _row(number, value, place, how)


def _parquet_rows(path: Path, how: Reading) -> Iterator[Row]:
    if parquet is None:
        raise DataError(f"{path} is a Parquet file, which needs the package pyarrow: install daedal[train]")
    size, number = path.stat().st_size, 1
    try:
        with parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            columns = (_column(how, present), *how.others)
            _require(columns, present, str(path))
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(dict.fromkeys(columns))):
                for value in batch.to_pylist():
                    yield _row(number, value, f"{path}, row {number},", how)
                    number += 1
                how.consumed(size * (number - 1) // total)
    except DataError:
        raise
    except (ValueError, NotImplementedError) as error:  # what pyarrow raises of a bad file
        raise DataError(f"{path} is no Parquet file, or damaged, from row {number} on ({error}): fetch it again") from (
            error
        )


def _row(number: int, value: Mapping[str, object], place: str, how: Reading) -> Row:
    column = _column(how, list(value))
    _require((column, *how.others), list(value), place)
    fields = {name: _text(value[name], name, place) for name in how.others}
    if column == how.column:
        return Row(number=number, text=_text(value[column], column, place), fields=fields)
    messages = _messages(value[MESSAGES], place)
    said = "\n\n".join(message["content"] for message in messages)
    return Row(number=number, text=said, fields=fields, messages=messages)


def _column(how: Reading, present: Sequence[str]) -> str:
    return MESSAGES if how.column not in present and MESSAGES in present else how.column


def _messages(value: object, place: str) -> Messages:
    rule = "it must be a list of objects with the strings `role` and `content`"
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} has a {type(value).__name__} as {MESSAGES!r}, or none in it: {rule}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place} has a message that is not one: {rule}")
    return [{name: _text(message[name], name, place) for name in ("role", "content")} for message in value]


def _require(columns: Sequence[str], present: Sequence[str], place: str) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        names = ", ".join(sorted(present)) or "none"
        raise DataError(f"{place} has no column {missing[0]!r}, its columns are {names}: name the one that is meant")


def _text(value: object, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} has a {type(value).__name__} as {column!r}: it must be a string, remove the row")
    if "\0" in value:
        raise DataError(f"{place} has a NUL character in {column!r}: it is binary, remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} has a lone surrogate in {column!r} at character {error.start}, which no UTF-8 text has: remove it"
        ) from error
    return value
