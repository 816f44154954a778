"""Beginnings of texts in files, each of which holds a few pages' rows and all the tokens that led to them.

A file is called by the hash of all that it holds, so one that is damaged is known; it says for which model and layout
it was made, and lies in a folder of these, so none is taken for another. Files are written beside their names, synced,
and renamed. What was wanted longest ago goes first when all together outgrow their share of the disk. They are
safetensors, no code; still, whoever may write here may change answers, so the directory is the owner's alone. Knows no
requests and no engine.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from daedal.errors import ConfigError

logger = logging.getLogger(__name__)

VERSION = "1"  # of the layout of a file
LEAST_BYTES = 2**20
_IDS = "ids"
_HEAD_BYTES = 2**20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PrefixDirectory:
    """Where beginnings are kept. most_bytes: of all files in it. model: says which weights, in which format, so that
    no others have the same. Raises ConfigError.
    """

    path: Path
    most_bytes: int
    model: str

    def __post_init__(self) -> None:
        if self.most_bytes < LEAST_BYTES:
            raise ConfigError(f"most_bytes of beginnings is {self.most_bytes}: it must be at least {LEAST_BYTES}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One file's contents. ids: tokens from the start; salt: whose they are. first: the pages before those in `rows`,
    whose values are [pages, ...] by slot. rings: after so many tokens, the rows of rings by slot.
    """

    salt: str
    ids: tuple[int, ...]
    first: int
    rows: Mapping[str, Tensor]
    rings: Mapping[int, Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        rings = (tensor for ring in self.rings.values() for tensor in ring.values())
        return sum(tensor.nbytes for tensor in (*self.rows.values(), *rings))


class PrefixFiles:
    """The files of one model and layout. identity: of both. Raises ConfigError where the directory cannot be had."""

    def __init__(self, directory: PrefixDirectory, identity: str):
        self._root, self._most, self._identity = directory.path, directory.most_bytes, identity
        self._folder = directory.path / identity
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._folder.glob(".*.partial"):
                left.unlink(missing_ok=True)
        except OSError as error:
            message = f"{self._folder} cannot be used for beginnings ({error.strerror}): give another directory"
            raise ConfigError(message) from error

    def newest(self) -> list[Path]:
        """The files, those wanted last first."""
        return sorted(self._folder.glob("*.safetensors"), key=_wanted, reverse=True)

    def span(self, path: Path) -> tuple[int, int] | None:
        """(pages before, pages) of a file as it says itself, without all of it being read; None as for `read`."""

        def spanned() -> tuple[int, int]:
            with path.open("rb") as file:
                head = self._head(file.read(_HEAD_BYTES))
            return int(head["first"]), int(head["pages"])

        return _trusted(path, spanned)

    def read(self, path: Path) -> Segment | None:
        """None for a file that cannot be trusted, which is named in the log, and not touched."""

        def segment() -> Segment:
            data = path.read_bytes()
            if _digest(data) != path.stem:
                raise ValueError("its contents are not those that it was written with")
            return _segment(self._head(data), load(data))

        return _trusted(path, segment)

    def _head(self, data: bytes) -> dict[str, str]:
        """What a file says of itself. ValueError and its like where that is not for here."""
        head: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if (head["version"], head["identity"]) != (VERSION, self._identity):
            raise ValueError("it was made for another model or layout")
        return head

    def write(self, segment: Segment) -> tuple[Path, list[Path]] | None:
        """The file, and those that had to go for it; None for one that alone is more than all may take. Raises OSError
        where the disk refuses.
        """
        tensors = {f"row.{name}": tensor.contiguous() for name, tensor in segment.rows.items()}
        for end, ring in segment.rings.items():
            tensors |= {f"ring.{end}.{name}": tensor.contiguous() for name, tensor in ring.items()}
        tensors[_IDS] = torch.tensor(segment.ids, dtype=torch.int32)
        head = {
            "version": VERSION,
            "identity": self._identity,
            "salt": segment.salt,
            "first": str(segment.first),
            "pages": str(len(next(iter(segment.rows.values())))),
        }
        data = save(tensors, head)
        if len(data) > self._most:
            return None
        path = self._folder / f"{_digest(data)}.safetensors"
        if path.exists():
            self.wanted([path])
            return path, []
        gone = self._make_room(len(data))
        partial = self._folder / f".{path.stem}.{os.getpid()}.partial"
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return path, gone

    def wanted(self, paths: Iterable[Path]) -> None:
        """These were wanted just now; some may be gone."""
        for path in paths:
            try:
                os.utime(path)
            except FileNotFoundError:
                continue

    def _make_room(self, nbytes: int) -> list[Path]:
        gone: list[Path] = []
        held = sorted(self._root.glob("*/*.safetensors"), key=_wanted)
        used = sum(_size(path) for path in held)
        for path in held:
            if used + nbytes <= self._most:
                break
            used -= _size(path)
            path.unlink(missing_ok=True)
            gone.append(path)
        return gone


def identity_of(model: str, layout: Sequence[object]) -> str:
    """A name for both, in hexadecimal digits."""
    return blake2b(json.dumps([VERSION, model, list(layout)]).encode(), digest_size=16).hexdigest()


def _segment(head: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Segment:
    rings: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("ring."):
            _, end, slot = name.split(".", 2)
            rings.setdefault(int(end), {})[slot] = tensor
    return Segment(
        salt=head["salt"],
        ids=tuple(tensors[_IDS].tolist()),
        first=int(head["first"]),
        rows={name.removeprefix("row."): tensor for name, tensor in tensors.items() if name.startswith("row.")},
        rings=rings,
    )


def _trusted(path: Path, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:
        logger.warning("%s is ignored as a kept beginning: %s", path, error)
        return None


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=32).hexdigest()


def _wanted(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
