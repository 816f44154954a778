"""One tensor of a checkpoint file: its name, what it holds, and where in our parameters that belongs. Knows no layout.

Quantised weights are two tensors, codes and scales (V3, section 3.3; V4, section 3.4): FP8 codes share a scale per
block, FP4 codes lie two to a byte and share one per 32 columns of a row.
"""

import math
from dataclasses import dataclass

from daedal.shapes import DTYPE_BITS

FP8, FP4 = "float8_e4m3fn", "float4_e2m1fn_x2"
E8M0 = "float8_e8m0fnu"
FP4_GROUP = 32

Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class Scale:
    """The scales of one quantised tensor. dtype: float32, or powers of two as float8_e8m0fnu."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (1 if self.dtype == E8M0 else 4)


@dataclass(frozen=True)
class Piece:
    """One published tensor. shape: of the numbers it stands for; dtype: as written; place: where in our slot it lies
    (indices of the leading axes); scale: None for what is not quantised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Place = ()
    scale: Scale | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file: FP4 has two columns in a byte."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == FP4 else self.shape

    @property
    def nbytes(self) -> int:
        """In the file, scales included."""
        scales = 0 if self.scale is None else self.scale.nbytes
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8 + scales


def scale_of(name: str, shape: tuple[int, ...], dtype: str, *, block: tuple[int, int], scale_dtype: str) -> Scale:
    """The scales called `name` of a matrix of `shape` whose codes have `dtype`. scale_dtype: of FP8's."""
    rows, columns = shape
    if dtype == FP4:
        return Scale(name, (rows, -(-columns // FP4_GROUP)), E8M0)
    return Scale(name, (-(-rows // block[0]), -(-columns // block[1])), scale_dtype)
