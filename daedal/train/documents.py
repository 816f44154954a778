"""Documents to train on, out of files and directories of text, each with its source and its licence.

Reads .txt and .jsonl (also .gz and .xz) and .parquet. A row of JSON lines or Parquet is a document, a text or a
conversation (`messages`); plain text is cut into documents at blank lines (`Source.document_chars`). What a file is and
under which licence it may be used is said by the caller, else by a `sources.toml` beside it, else it is "unknown":

    ["austen.txt.xz"]
    source = "Jane Austen's novels"
    licence = "public domain"

Knows nothing of tokens.
"""

import hashlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from daedal.errors import DataError
from daedal.train.text_files import SUFFIXES, TEXT, Messages, Reading, read_rows, reading, suffix

UNKNOWN = "unknown"
SIDE_FILE = "sources.toml"
_DOCUMENT_CHARS = 2**15


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text. index: its number in its file, from 0; source: what it comes from, by name; licence: of its use.

    messages: of a conversation, whose text is what they say; how they are put together is the tokenizer's chat format.
    """

    text: str
    source: str
    licence: str
    index: int
    messages: Messages | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file, or a directory of files, and what is known of it.

    name, licence: of every file in it; None leaves it to the side file. source_column, licence_column: where each row
    says it itself. document_chars: plain text becomes documents of at least so many characters, up to the next blank
    line, or twice as many where none comes.
    """

    path: Path
    name: str | None = None
    licence: str | None = None
    source_column: str | None = None
    licence_column: str | None = None
    document_chars: int = _DOCUMENT_CHARS

    def __post_init__(self) -> None:
        if self.document_chars < 1:
            raise DataError(f"document_chars is {self.document_chars}: it must be at least 1")
        if (self.name and self.source_column) or (self.licence and self.licence_column):
            raise DataError(f"{self.path} is given a name or licence and a column for it: give one of the two")


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    name: str
    licence: str
    origin: Source


def read_documents(
    sources: Iterable[Path | str | Source],
    *,
    column: str = "text",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Document]:
    """Every document of the sources in order; directories recursively, in the order of their files' names.

    column: of the text, in JSON lines and Parquet. progress: called with (bytes of the files read, in all). A row
    without a character is handed on, for whoever counts. DataError names the file and the row that cannot be used.
    """
    files = _files(sources)
    sizes = [file.path.stat().st_size for file in files]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        yield from _documents(file, column, partial(_report, progress, before, sum(sizes)))
        before += size
        progress(before, sum(sizes))


def fingerprint(
    sources: Iterable[Path | str | Source], *, column: str = "text", chat_digest: str = ""
) -> dict[str, str]:
    """What decides the documents of these sources, file by file: contents, licence, and how they are read.

    chat_digest: of how conversations are written, which files that may hold some depend on.
    """
    found = {}
    for number, file in enumerate(_files(sources)):
        origin = file.origin
        with reading(file.path), file.path.open("rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
        how: tuple[object, ...] = (column, origin.source_column, origin.licence_column, origin.document_chars)
        if chat_digest and TEXT not in file.path.suffixes:
            how = (*how, chat_digest)
        found[f"{number} {file.path.name}"] = f"{contents} {file.name} {file.licence} {how}"
    return found


def licence_of(path: Path) -> str:
    """The licence of a file's use, as the side file says it; UNKNOWN where it does not."""
    return _side_file(path.parent).get(path.name, {}).get("licence", UNKNOWN)


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _documents(file: _File, column: str, consumed: Callable[[int], None]) -> Iterator[Document]:
    name_column, licence_column = file.origin.source_column, file.origin.licence_column
    how = Reading(
        column=column,
        others=[name for name in (name_column, licence_column) if name is not None],
        document_chars=file.origin.document_chars,
        consumed=consumed,
    )
    for index, row in enumerate(read_rows(file.path, how)):
        yield Document(
            text=row.text,
            source=row.fields[name_column] if name_column else file.name,
            licence=row.fields[licence_column] if licence_column else file.licence,
            index=index,
            messages=row.messages,
        )


def _files(sources: Iterable[Path | str | Source]) -> list[_File]:
    if isinstance(sources, str | Path | Source):
        sources = [sources]
    found: list[_File] = []
    seen: set[Path] = set()
    described: dict[Path, Mapping[str, Mapping[str, str]]] = {}
    for given in sources:
        source = given if isinstance(given, Source) else Source(path=Path(given))
        for path in _paths(source.path):
            if path.resolve() in seen:
                raise DataError(f"{path} is named twice, its documents would repeat: name it once, train more epochs")
            seen.add(path.resolve())
            if path.parent not in described:
                described[path.parent] = _side_file(path.parent)
            known = described[path.parent].get(path.name, {})
            shown = path.relative_to(source.path.parent).as_posix()
            found.append(
                _File(
                    path=path,
                    name=source.name or known.get("source") or shown,
                    licence=source.licence or known.get("licence") or UNKNOWN,
                    origin=source,
                )
            )
    if not found:
        raise DataError("no source of text is named: name a file or a directory")
    return found


def _paths(path: Path) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = sorted(path.rglob("*"))
        files = [file for file in inside if _visible(file.relative_to(path)) and suffix(file) and file.is_file()]
        if not files:
            raise DataError(f"{path} holds no file to read, their names must end in one of {kinds}: name another place")
    elif not path.exists():
        raise DataError(f"{path} does not exist: name a file or a directory of text")
    elif suffix(path) is None:
        raise DataError(f"{path} is of an unknown kind, the name must end in one of {kinds}: convert or rename it")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty, every file must hold text: remove it from the sources")
    return files


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _side_file(directory: Path) -> Mapping[str, Mapping[str, str]]:
    path = directory / SIDE_FILE
    if not path.is_file():
        return {}
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} cannot be read as TOML ({error}): correct it") from error
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not all(
            key in ("source", "licence") and isinstance(value, str) for key, value in entry.items()
        ):
            raise DataError(f"{path} describes {name!r} by more than strings `source` and `licence`: correct it")
        if not (directory / name).is_file():
            raise DataError(f"{path} describes {name!r}, which is not there: correct the name or remove the entry")
    return entries
