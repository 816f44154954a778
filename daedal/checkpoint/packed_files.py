"""Packed weights in two files: `weights.bin`, the bytes of all entries, and `index.json`, what lies where.

Written once from front to back; read by mapping the file into memory, so that a model is there before its bytes are.
Entries begin on multiples of 4096 bytes, small ones of 64. The index also says what the weights were made of. Whatever
does not fit what is expected is named and never half used. Knows neither checkpoints nor caches.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from daedal.checkpoint import huge_pages
from daedal.errors import CheckpointError
from daedal.ops.packed import Packed
from daedal.packed import FORMATS, packed_bytes

VERSION = 1
FOLDER = "packed"  # where both files lie: below the user's cache, or in a checkpoint that is packed itself
WEIGHTS_FILE, INDEX_FILE = "weights.bin", "index.json"

_PAGE, _LINE = 4096, 64


@dataclass(frozen=True)
class Entry:
    """kind: a packed format, or a dtype as torch calls it."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        if self.kind in FORMATS:
            return packed_bytes(self.kind, self.shape)
        dtype: torch.dtype = getattr(torch, self.kind)
        return math.prod(self.shape) * dtype.itemsize


def offsets(entries: Sequence[Entry]) -> tuple[list[int], int]:
    """Where each entry begins, and the size of the file."""
    found, end = [], 0
    for entry in entries:
        align = _PAGE if entry.nbytes >= _PAGE else _LINE
        found.append(-(-end // align) * align)
        end = found[-1] + entry.nbytes
    return found, end


def write(
    directory: Path,
    entries: Sequence[Entry],
    contents: Callable[[Entry], Iterable[Tensor]],
    identity: dict[str, object],
    progress: Callable[[int, int], None],
) -> None:
    """Writes both files. contents: an entry's tensors, whose bytes follow each other. progress: in bytes."""
    places, total = offsets(entries)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        for entry, offset in zip(entries, places, strict=True):
            file.seek(offset)
            for tensor in contents(entry):
                _write(file, tensor)
                progress(file.tell(), total)
            assert file.tell() == offset + entry.nbytes, entry
        file.truncate(total)
    index = {"version": VERSION, "identity": identity, "nbytes": total, "entries": _listed(entries, places)}
    (directory / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")


def read_identity(directory: Path) -> dict[str, object]:
    """What the weights were made of. CheckpointError for an index that is absent or damaged."""
    identity = _index(directory).get("identity")
    if not isinstance(identity, dict):
        raise CheckpointError(f"{directory / INDEX_FILE} does not say what it was made of: pack the weights again")
    return identity


def read(directory: Path, entries: Sequence[Entry]) -> list[Tensor | Packed]:
    """The entries: packed ones on huge pages where the system has them, all others mapped. CheckpointError where the
    files hold anything else, or not all of it.
    """
    index = _index(directory)
    places, total = offsets(entries)
    wanted = {"nbytes": total, "entries": _listed(entries, places)}
    for key, value in wanted.items():
        if index.get(key) != value:
            raise CheckpointError(f"{directory / INDEX_FILE} lists other {key} than the model has: pack it again")
    path = directory / WEIGHTS_FILE
    try:
        size = path.stat().st_size
        if size != total:
            raise CheckpointError(f"{path} has {size} bytes, its index promises {total}: pack the weights again")
        mapped = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)
        parts = {
            entry.name: (offset, entry.nbytes)
            for entry, offset in zip(entries, places, strict=True)
            if entry.kind in FORMATS
        }
        copies = dict(zip(parts, huge_pages.copied(path, list(parts.values())) or [], strict=False))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be mapped ({error}): pack the weights again") from error
    return [
        _view(entry, copies.get(entry.name, mapped[offset : offset + entry.nbytes]))
        for entry, offset in zip(entries, places, strict=True)
    ]


def _view(entry: Entry, data: Tensor) -> Tensor | Packed:
    if entry.kind in FORMATS:
        return Packed(data, entry.kind, entry.shape)
    return data.view(getattr(torch, entry.kind)).view(entry.shape)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    file.write(flat.numpy().data)


def _listed(entries: Sequence[Entry], places: Sequence[int]) -> dict[str, list[object]]:
    return {
        entry.name: [entry.kind, [*entry.shape], offset, entry.nbytes]
        for entry, offset in zip(entries, places, strict=True)
    }


def _index(directory: Path) -> dict[str, object]:
    path = directory / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of packed weights ({error}): pack them again") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise CheckpointError(f"{path} is not of version {VERSION}: pack the weights again")
    return index
