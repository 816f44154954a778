"""What the silicon gives: bytes read and FLOPs multiplied per second, in each format of weights, through the ops.

A product of one row with a matrix that no cache holds shows how fast weights are read, and one of a chunk of rows how
fast they are multiplied: the two things that a step does with them. Between the two lie batches, and the few tokens
that come to each expert, whose rates follow neither: they are measured for some numbers of rows. Formats that no kernel
here reads as they are would be expanded first, so they are left out. Knows no model and no engine.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from daedal import ops
from daedal.bench.machine import settle
from daedal.bench.timing import Clock, Timing, repeated
from daedal.ops.packed import Packed
from daedal.ops.registry import REFERENCE
from daedal.packed import FORMATS, packed_bytes

PLAIN: Mapping[str, torch.dtype] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})
READ_BYTES, READ_COLUMNS = 2**29, 4096
ROWS, SIDE = 512, 2048
BY_ROWS, BY_ROWS_COLUMNS, MOST_WRITTEN = (1, 4, 16, 64, ROWS), 1024, 2**20
# In every packed format these bytes are small finite numbers, as codes and as scales.
_BYTE = 0x3C


@dataclass(frozen=True, kw_only=True)
class Rate:
    """amount: bytes or FLOPs of one call."""

    amount: float
    timing: Timing

    @property
    def per_second(self) -> float:
        return self.amount / self.timing.median


def formats(device: torch.device) -> list[str]:
    """Plain ones, by torch's names, and those packed ones that a kernel here reads as they are."""
    return [*PLAIN, *(form for form in FORMATS if device.type == "cpu" and _has_kernel(form))]


def read_rate(form: str, device: torch.device, *, clock: Clock, seconds: float, nbytes: int = READ_BYTES) -> Rate:
    """Bytes per second of one row times a matrix of `nbytes` in a format."""
    unit = _nbytes(form, 16, READ_COLUMNS)
    matrix = _matrix(form, 16 * max(nbytes // unit, 1), READ_COLUMNS, device)
    return _rate(_size(matrix), matrix, 1, clock=clock, seconds=seconds)


def multiply_rate(form: str, device: torch.device, *, clock: Clock, seconds: float, side: int = SIDE) -> Rate:
    """FLOP/s of `ROWS` rows times a square matrix in a format."""
    return _rate(2.0 * ROWS * side * side, _matrix(form, side, side, device), ROWS, clock=clock, seconds=seconds)


def rows_rate(form: str, rows: int, device: torch.device, *, clock: Clock, seconds: float, nbytes: int) -> Rate:
    """FLOP/s of so many rows times a matrix in a format: of `nbytes`, which lie in memory, or less where that would
    make many rows write more than they read.
    """
    unit = _nbytes(form, 16, BY_ROWS_COLUMNS)
    height = min(16 * max(nbytes // unit, 1), MOST_WRITTEN // rows)
    matrix = _matrix(form, height, BY_ROWS_COLUMNS, device)
    return _rate(2.0 * rows * height * BY_ROWS_COLUMNS, matrix, rows, clock=clock, seconds=seconds)


def thread_counts() -> Sequence[int]:
    """1, 2, 4 and so on, and all that torch uses."""
    every = torch.get_num_threads()
    return sorted({*(2**power for power in range(every.bit_length())), every})


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch and the kernels use so many inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(amount: float, matrix: Tensor | Packed, rows: int, *, clock: Clock, seconds: float) -> Rate:
    dtype = torch.bfloat16 if isinstance(matrix, Packed) else matrix.dtype
    x_TD = torch.full((rows, matrix.shape[-1]), 0.5, dtype=dtype, device=matrix.device)

    def multiply() -> None:
        ops.linear(x_TD, matrix)
        settle(x_TD.device)

    with torch.inference_mode():
        return Rate(amount=amount, timing=repeated(multiply, clock=clock, seconds=seconds, least=3))


def _matrix(form: str, rows: int, columns: int, device: torch.device) -> Tensor | Packed:
    """Written wholly, so that every page of it is memory of its own."""
    if form in PLAIN:
        return torch.full((rows, columns), 0.01, dtype=PLAIN[form], device=device)
    data = torch.full((packed_bytes(form, (rows, columns)),), _BYTE, dtype=torch.uint8)
    return Packed(data, form, (rows, columns))


def _size(matrix: Tensor | Packed) -> int:
    return matrix.data.nbytes


def _nbytes(form: str, rows: int, columns: int) -> int:
    if form in PLAIN:
        return rows * columns * PLAIN[form].itemsize
    return packed_bytes(form, (rows, columns))


def _has_kernel(form: str) -> bool:
    matrix = _matrix(form, 16, FORMATS[form].group, torch.device("cpu"))
    x_TD = torch.zeros(1, matrix.shape[-1], dtype=torch.bfloat16)
    chosen = next(choice for choice in ops.explain("linear", x_TD, matrix, None) if choice.chosen)
    return chosen.backend != REFERENCE
