"""Rows of a cache in eight bits: most numbers of a row as FP8 with small shared scales, its last ones in bfloat16.

So V4's published engine keeps its rows (V4, 2.3): what carries the position, at a row's end, is spoilt by eight bits
and stays exact. This file is the truth of the byte order, for Python and for kernels. One row is, byte after byte:

    `exact` bfloat16 numbers | `width` codes, e4m3 | one scale for each 64 codes, the last group may be short | a byte
    of padding where the sum is odd

Rows begin on even addresses, so bfloat16 numbers lie aligned. A scale is a power of two, stored as its exponent plus
127 (e8m0; 255 is NaN): the smallest that keeps a group within 448, and no smaller than 2^-117, from where on every
product of scale and code is a normal number. A code has four significant bits, so unpacking is exact in bfloat16 as in
float32. A group that holds an infinity or NaN becomes NaN throughout. Knows nothing of pages or models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.ops.formats import FP8
from daedal.shapes import EIGHT_BIT_GROUP, eight_bit_row

GROUP = EIGHT_BIT_GROUP  # codes that share a scale
NAN = 255  # a scale that makes its group NaN; a row of such bytes is NaN throughout
_LEAST = 10  # 2^-117
_OVER = 8  # 448 is 1.75 * 2^8


@dataclass(frozen=True)
class PackedRows:
    """Rows of `width` numbers in FP8 and then `exact` in bfloat16; they come back in `dtype`."""

    width: int
    exact: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return self.width + self.exact

    @property
    def groups(self) -> int:
        return -(-self.width // GROUP)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return eight_bit_row(self.width, self.exact)

    def pack(self, rows: Tensor) -> Tensor:
        """uint8 [..., nbytes] from numbers [..., width + exact] of any floating-point dtype."""
        numbers, exact = rows.split((self.width, self.exact), -1)
        padded = F.pad(numbers.float(), (0, self.groups * GROUP - self.width))
        grouped: Tensor = padded.unflatten(-1, (self.groups, GROUP))
        scales = _scales(grouped.abs().amax(-1))
        codes = (grouped * torch.exp2(127.0 - scales).unsqueeze(-1)).flatten(-2)[..., : self.width]
        parts = [exact.bfloat16().contiguous().view(torch.uint8), codes.to(FP8).view(torch.uint8), scales.byte()]
        together = torch.cat(parts, -1)
        return F.pad(together, (0, self.nbytes - together.shape[-1]))

    def unpack(self, packed: Tensor) -> Tensor:
        """[..., width + exact] in `dtype` from bytes [..., nbytes]: exactly what they stand for."""
        sizes = 2 * self.exact, self.width, self.groups
        exact, codes, scales = packed[..., : sum(sizes)].split(sizes, -1)
        spread = _powers(scales).repeat_interleave(GROUP, -1)[..., : self.width]
        numbers = codes.contiguous().view(FP8).float() * spread
        return torch.cat((numbers.to(self.dtype), exact.contiguous().view(torch.bfloat16).to(self.dtype)), -1)


def _scales(largest: Tensor) -> Tensor:
    """Bytes, as float32, of each group's scale from its largest magnitude, float32."""
    # The exponent as float32 has it, one more where the mantissa is above that of 448, 1.75.
    exponents = (largest.view(torch.int32) + 0x1FFFFF) >> 23
    return torch.where(largest.isfinite(), (exponents - _OVER).clamp_min(_LEAST), NAN).float()


def _powers(scales: Tensor) -> Tensor:
    """float32 from bytes. All that packing makes are normal numbers: the byte is the exponent as float32 has it."""
    powers = (scales.to(torch.int32) << 23).view(torch.float32)
    return torch.where(scales == NAN, torch.nan, powers)
