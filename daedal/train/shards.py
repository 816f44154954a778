"""Writes a tokenised dataset, once: ids in shards that are mapped into memory, and a manifest.

The directory appears whole or not at all: everything is written beside it, flushed to disk, and one rename publishes
it. Several processes may ask for the same dataset; one writes, the others wait and find it. Which documents are held
out, the hash of each decides alone, so no order of files moves a document, and copies of one text stay together.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from daedal.checkpoint.staging import locked, staged
from daedal.errors import DataError
from daedal.train.documents import Source, fingerprint, read_documents
from daedal.train.encoding import Encoded, Encoder, Vocabulary
from daedal.train.manifest import (
    BYTES_PER_TOKEN,
    DOCUMENT,
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    Origin,
    Shard,
    read_manifest,
)

TOKENS_PER_SHARD = 2**27
_FLUSH_TOKENS = 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, kw_only=True)
class Written:
    """How far the writer is: documents, tokens and bytes of text so far."""

    documents: int
    tokens: int
    bytes: int


def prepare(
    sources: Iterable[Path | str | Source],
    tokenizer: Path | str,
    directory: Path | str,
    *,
    column: str = "text",
    validation: float = 0.0,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Callable[[int, int], None] = lambda done, total: None,
    waiting: Callable[[], None] = lambda: None,
) -> Manifest:
    """Tokenises sources of text into `directory`, or finds that this is done. See `write_shards`.

    tokenizer: a directory with tokenizer.json. progress: called with (bytes of the files read, in all).
    """
    encoder = Encoder.load(tokenizer)
    named = [sources] if isinstance(sources, str | Path | Source) else list(sources)
    return write_shards(
        encoder.encode(read_documents(named, column=column, progress=progress)),
        encoder.vocabulary,
        directory,
        inputs=fingerprint(named, column=column, chat_digest=encoder.chat_digest),
        validation=validation,
        tokens_per_shard=tokens_per_shard,
        waiting=waiting,
    )


def write_shards(
    documents: Iterable[Encoded],
    vocabulary: Vocabulary,
    directory: Path | str,
    *,
    inputs: Mapping[str, str] | None = None,
    validation: float = 0.0,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Callable[[Written], None] = lambda written: None,
    waiting: Callable[[], None] = lambda: None,
) -> Manifest:
    """Makes `directory` a dataset of the documents, each between the vocabulary's BOS, if it has one, and its EOS.

    inputs: what decides the documents; where `directory` is a dataset of the same already, it is left as it is and no
    document is asked for. validation: the fraction of documents held out. tokens_per_shard: at most, unless one
    document alone is longer. waiting: called if another process is writing. DataError where `directory` holds anything
    else, a document has an id outside the vocabulary, there is no document, or the disk is full.
    """
    directory = Path(directory).resolve()
    if not 0 <= validation < 1:
        raise DataError(f"the validation fraction is {validation}: it must be at least 0 and below 1")
    if tokens_per_shard < 1:
        raise DataError(f"tokens_per_shard is {tokens_per_shard}: it must be at least 1")
    wanted = Manifest(
        vocab_size=vocabulary.size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        tokenizer_digest=vocabulary.digest,
        validation=validation,
        inputs=dict(inputs) if inputs is not None else None,
        exact_bytes=True,
        empty_documents=0,
        origins=(),
        shards=(),
    )
    with _disk(directory), locked(directory.with_name(f".{directory.name}.lock"), waiting=waiting):
        if (directory / MANIFEST).is_file():
            return _reused(directory, wanted)
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise DataError(f"{directory} exists and is not a tokenised dataset: name another place, or remove it")
        with staged(directory) as partial:
            manifest = _write(_shielded(documents), vocabulary, wanted, partial, tokens_per_shard, progress)
            (partial / BYTES_PER_TOKEN).write_bytes(vocabulary.bytes_per_token_V.astype("<u4").tobytes())
            (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _reused(directory: Path, wanted: Manifest) -> Manifest:
    present = read_manifest(directory)
    if wanted.inputs is None:
        raise DataError(
            f"{directory} is a dataset already, and it cannot be told whether of these documents: open it, or name "
            f"another place"
        )
    compared = ("vocab_size", "bos_id", "eos_id", "tokenizer_digest", "validation")
    differing = [name for name in compared if getattr(present, name) != getattr(wanted, name)]
    before = present.inputs or {}
    files = sorted(name for name in {*before, *wanted.inputs} if before.get(name) != wanted.inputs.get(name))
    differing += [f"the input {name!r}" for name in files]
    if differing:
        raise DataError(
            f"{directory} is a dataset already, and differs in {', '.join(differing[:5])}: name another place, or "
            f"remove it"
        )
    return present


def _write(
    documents: Iterable[Encoded],
    vocabulary: Vocabulary,
    wanted: Manifest,
    directory: Path,
    tokens_per_shard: int,
    progress: Callable[[Written], None],
) -> Manifest:
    splits = {name: _Split(name, directory, wanted, tokens_per_shard) for name in (TRAIN, VALIDATION)}
    threshold = int(wanted.validation * 2**64)
    lengths_V = vocabulary.bytes_per_token_V.astype(np.int64)
    origins: dict[Origin, int] = {}
    empty, exact, num_documents, num_tokens, num_bytes = 0, True, 0, 0, 0
    for document in documents:
        if not len(document.ids_T):
            empty += 1
            continue
        _check_ids(document, vocabulary.size)
        exact = exact and int(lengths_V[document.ids_T].sum()) == document.num_bytes
        origin = origins.setdefault(Origin(source=document.source, licence=document.licence), len(origins))
        held_out = int.from_bytes(document.digest, "big") < threshold
        num_tokens += splits[VALIDATION if held_out else TRAIN].add(document, origin)
        num_documents, num_bytes = num_documents + 1, num_bytes + document.num_bytes
        progress(Written(documents=num_documents, tokens=num_tokens, bytes=num_bytes))
    if not num_documents:
        raise DataError("there is no document with a token in it, a dataset needs some: name other sources")
    return Manifest(
        **{name: getattr(wanted, name) for name in ("vocab_size", "bos_id", "eos_id", "tokenizer_digest")},
        validation=wanted.validation,
        inputs=wanted.inputs,
        exact_bytes=exact,
        empty_documents=empty,
        origins=tuple(origins),
        shards=tuple(shard for split in splits.values() for shard in split.close()),
    )


def _check_ids(document: Encoded, vocab_size: int) -> None:
    low, high = int(document.ids_T.min()), int(document.ids_T.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{document.source}, document {document.index}, has the id {low if low < 0 else high}, the vocabulary has "
            f"{vocab_size} ids: tokenise it with the same tokenizer"
        )


@dataclass
class _Open:
    """The shard that is being written."""

    tokens: int = 0
    bytes: int = 0
    ends: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)


class _Split:
    """Documents of one split, appended shard after shard."""

    def __init__(self, name: str, directory: Path, manifest: Manifest, tokens_per_shard: int):
        self._name, self._directory, self._limit = name, directory, tokens_per_shard
        self._dtype = manifest.dtype
        self._before = np.array([] if manifest.bos_id is None else [manifest.bos_id], dtype=self._dtype)
        self._after = np.array([manifest.eos_id], dtype=self._dtype)
        self._open = _Open()
        self._done: list[Shard] = []
        self._pending: list[npt.NDArray[np.unsignedinteger]] = []
        self._pending_tokens = 0

    def add(self, document: Encoded, origin: int) -> int:
        """Appends it, and says how many tokens it takes."""
        ids_T = np.concatenate((self._before, document.ids_T.astype(self._dtype), self._after))
        if self._open.tokens and self._open.tokens + len(ids_T) > self._limit:
            self._finish()
        shard = self._open
        shard.tokens += len(ids_T)
        shard.bytes += document.num_bytes
        shard.ends.append(shard.tokens)
        shard.origins.append(origin)
        self._pending.append(ids_T)
        self._pending_tokens += len(ids_T)
        if self._pending_tokens >= _FLUSH_TOKENS:
            self._flush()
        return len(ids_T)

    def close(self) -> list[Shard]:
        if self._open.tokens:
            self._finish()
        return self._done

    @property
    def _stem(self) -> str:
        return f"{self._name}-{len(self._done):05d}"

    def _flush(self) -> None:
        with (self._directory / f"{self._stem}.tokens").open("ab") as file:
            for ids_T in self._pending:
                file.write(ids_T.tobytes())
        self._pending, self._pending_tokens = [], 0

    def _finish(self) -> None:
        self._flush()
        shard = self._open
        table = np.empty(len(shard.ends), dtype=DOCUMENT)
        table["end"], table["source"] = shard.ends, shard.origins
        paths = [self._directory / f"{self._stem}.{kind}" for kind in ("tokens", "documents")]
        paths[1].write_bytes(table.tobytes())
        self._done.append(
            Shard(
                name=self._stem,
                split=self._name,
                tokens=shard.tokens,
                documents=len(shard.ends),
                bytes=shard.bytes,
                origins=tuple(sorted(set(shard.origins))),
                tokens_sha256=file_sha256(paths[0]),
                documents_sha256=file_sha256(paths[1]),
            )
        )
        self._open = _Open()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shielded(documents: Iterable[Encoded]) -> Iterator[Encoded]:
    """The documents; what their own source refuses is not taken for the disk of the dataset."""
    try:
        yield from documents
    except OSError as error:
        raise DataError(f"the documents cannot be read ({error}): check where they come from") from error


@contextmanager
def _disk(directory: Path) -> Iterator[None]:
    """Turns whatever the disk of `directory` refuses into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            why = os.strerror(error.errno)
            raise DataError(
                f"the disk of {directory} holds no more ({why}), the tokenised text must fit: free some space, or name "
                f"another place"
            ) from error
        raise DataError(f"{directory} cannot be written ({error}): name another place") from error
