"""Reads a GGUF file once its header was found to fit into it.

The `gguf` library reads an array value by value for as long as its count says, also beyond the end of the file, where
it finds nothing and goes on: one count of 2⁶³ keeps it for ever. So the header is walked first, by sizes alone, and
each count must fit into what is left of the file. Knows nothing of what the values mean.
"""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf

from daedal.errors import CheckpointError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_STRING, _ARRAY = 8, 9
_LEVELS = 4  # of arrays within arrays
_DIMENSIONS = 4


def read_gguf(path: Path) -> tuple[dict[str, object], Sequence[gguf.gguf_reader.ReaderTensor]]:
    """Its metadata and its tensors. CheckpointError for what is no GGUF file, or a damaged one."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).header()
            size = len(data)
        reader = gguf.GGUFReader(path)
        if (claimed := sum(tensor.n_bytes for tensor in reader.tensors)) > size:
            raise ValueError(f"its tensors claim {claimed} bytes, it has {size}")
        return {key: entry.contents() for key, entry in reader.fields.items()}, reader.tensors
    # What the library raises of a damaged file; struct.error is beyond the end, mmap has no empty files.
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}): fetch it again") from error


class _Walk:
    """A place in the file, and what comes next there. ValueError or struct.error where that cannot be."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._order = data, 0, "<"

    def header(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        if not self._number("I") & 0xFFFF:
            self._at, self._order = 8, ">"  # written on a machine of the other byte order
        tensors, values = self._number("Q"), self._number("Q")
        for _ in range(values):
            self._string()
            self._value(self._number("I"), _LEVELS)
        for _ in range(tensors):
            self._string()
            if (dimensions := self._number("I")) > _DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions, there are at most {_DIMENSIONS}")
            self._pass(8 * dimensions + 4 + 8)

    def _value(self, kind: int, levels: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array(levels)
        elif kind in _SIZES:
            self._pass(_SIZES[kind])
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _array(self, levels: int) -> None:
        if not levels:
            raise ValueError(f"arrays within arrays, more than {_LEVELS} deep")
        kind, count = self._number("I"), self._number("Q")
        if kind in _SIZES:
            self._pass(_SIZES[kind] * count)
            return
        for _ in range(count):
            self._value(kind, levels - 1)

    def _string(self) -> None:
        self._pass(self._number("Q"))

    def _number(self, form: str) -> int:
        number: int
        (number,) = struct.unpack_from(self._order + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return number

    def _pass(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError(f"{size} bytes are said to follow at {self._at}, it has {len(self._data)}")
        self._at += size
