"""Number formats of weights: FP8 e4m3 in square blocks, FP4 e2m1 in groups of 32 columns, and their scales.

FP8: a block of 128 x 128 weights shares one scale; value = code * scale (V3, section 3.3). FP4: two codes to a byte,
the even column in the low four bits; each row has a scale per 32 columns (MXFP4; V4, section 3.4). Scales are float32,
or powers of two stored as one byte, the exponent plus 127 (e8m0). Reading is exact: codes and scales are float32
numbers and their product is not rounded again, short of float32's own range. Leading axes stand for stacked matrices.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.errors import CheckpointError
from daedal.layouts import FP4_GROUP

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

_E8M0_NAN = 255
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# frexp of the largest codes: 448 = 0.875 * 2^9, 6 = 0.75 * 2^3.
_FP8_FREXP, _FP4_FREXP = (0.875, 9), (0.75, 3)


def scale_values(scale: Tensor) -> Tensor:
    """float32 scales from any stored form: e8m0, its bytes as uint8 (exponents, never numbers), or plain floats.

    CheckpointError for a byte that means NaN, and for scales that are negative or not finite.
    """
    if scale.dtype in (torch.float8_e8m0fnu, torch.uint8):
        exponents = scale.view(torch.uint8).to(torch.int32)
        if (exponents == _E8M0_NAN).any():
            raise CheckpointError("scales hold the byte 255, which is no number: fetch the file again")
        # The byte is float32's own exponent; below its normal range, 2^-127 is half of the smallest normal number.
        return torch.where(exponents == 0, 0x400000, exponents << 23).view(torch.float32)
    values = scale.float()
    if not (torch.isfinite(values) & (values >= 0)).all():
        raise CheckpointError("scales hold negative numbers, infinities or NaN: fetch the file again")
    return values


def to_e8m0(scale: Tensor) -> Tensor:
    """float32 powers of two from 2^-127 to 2^127 as e8m0. CheckpointError for any other number."""
    if not are_powers_of_two(scale):
        raise CheckpointError("scales are no powers of two, so e8m0 cannot hold them: quantise the weights again")
    return scale.to(torch.float8_e8m0fnu)


def are_powers_of_two(scale: Tensor) -> bool:
    """Whether e8m0 holds all of float32 `scale` exactly."""
    return torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)


def dequantise_blocks(codes_NK: Tensor, scale_bk: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [..., N, K] from e4m3 codes and one scale per block; blocks at the edges may be partial."""
    *leading, rows, columns = codes_NK.shape
    _check_scales(
        codes_NK, scale_bk, (*leading, -(-rows // block[0]), -(-columns // block[1])), f"blocks of {[*block]}"
    )
    return codes_NK.float() * _spread(scale_values(scale_bk), block, rows, columns)


def quantise_blocks(weight_NK: Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [..., N, K], scales float32 per block): the largest magnitude of a block becomes 448.

    power_of_two rounds scales up, so that nothing overflows. An empty block has scale 1. CheckpointError for weights
    that are not finite.
    """
    *_, rows, columns = weight_NK.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = F.pad(weight_NK.float(), padding).unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest_bk = finite(padded.abs().amax((-3, -1)))
    if power_of_two:
        scale_bk = _power_above(largest_bk, *_FP8_FREXP)
    else:
        scale_bk = torch.where(largest_bk > 0, (largest_bk / FP8_MAX).clamp_min(2.0**-126), 1.0)
    codes = weight_NK.float() / _spread(scale_bk, block, rows, columns)
    return codes.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_bk


def unpack_fp4(packed: Tensor) -> Tensor:
    """float32 [..., K] from bytes [..., K / 2] (int8 or uint8): the numbers that codes stand for, without scales."""
    numbers = torch.tensor([*_FP4_MAGNITUDES, *(-size for size in _FP4_MAGNITUDES)], device=packed.device)
    low, high = numbers.repeat(16), numbers.repeat_interleave(16)
    return F.embedding(packed.view(torch.uint8).to(torch.int32), torch.stack((low, high), -1)).flatten(-2)


def pack_fp4(codes: Tensor) -> Tensor:
    """int8 [..., K / 2] from uint8 codes [..., K], 0 to 15 (bit 3 is the sign); K is even."""
    even, odd = codes.unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = (even | odd << 4).view(torch.int8)
    return packed


def dequantise_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., N, K] from bytes [..., N, K / 2] and scales [..., N, K / 32]."""
    columns = 2 * packed.shape[-1]
    if columns % FP4_GROUP:
        raise CheckpointError(f"FP4 weights have {columns} columns: they come in groups of {FP4_GROUP}")
    _check_scales(
        packed, scale, (*packed.shape[:-1], columns // FP4_GROUP), f"two codes to a byte, {FP4_GROUP} a group"
    )
    grouped = unpack_fp4(packed).unflatten(-1, (-1, FP4_GROUP))
    values: Tensor = (grouped * scale_values(scale).unsqueeze(-1)).flatten(-2)
    return values


def quantise_fp4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [..., N, K / 2], float32 scales [..., N, K / 32]): the smallest power of two that keeps a group within 6,
    then the nearest code, the even one of two as near. CheckpointError for weights not finite or not in whole groups.
    """
    columns = weight_NK.shape[-1]
    if columns % FP4_GROUP:
        raise CheckpointError(f"the weights have {columns} columns: FP4 needs a multiple of {FP4_GROUP}, use fp8")
    grouped = weight_NK.float().unflatten(-1, (-1, FP4_GROUP))
    scale = _power_above(finite(grouped.abs().amax(-1)), *_FP4_FREXP)
    return pack_fp4(_nearest_fp4(grouped / scale.unsqueeze(-1)).flatten(-2)), scale


def fp4_to_fp8(packed: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, bool]:
    """(codes e4m3 [..., N, K], scales float32 per block, exact): the same numbers in FP8 where they fit.

    A block's scale is 1/64 of its largest group's, so that 6 becomes 384 and groups of up to 2^14 times smaller scale
    stay exact (V4, section 3.4). Where a block spreads wider, the numbers are quantised anew, and may not be exact.
    """
    values = dequantise_fp4(packed, scale)
    rows, columns = values.shape[-2:]
    groups = scale_values(scale).repeat_interleave(FP4_GROUP, -1)
    padding = (0, -columns % block[1], 0, -rows % block[0])
    blocks = F.pad(groups, padding).unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scale_bk = (blocks.amax((-3, -1)) / 64).clamp_min(2.0**-127)
    codes = (values / _spread(scale_bk, block, rows, columns)).to(FP8)
    if torch.equal(dequantise_blocks(codes, scale_bk, block), values):
        return codes, scale_bk, True
    codes, scale_bk = quantise_blocks(values, block, power_of_two=True)
    return codes, scale_bk, torch.equal(dequantise_blocks(codes, scale_bk, block), values)


def _nearest_fp4(values: Tensor) -> Tensor:
    """uint8 codes of numbers within ±6. Halfway between two codes the even one wins: below odd codes, from the midpoint
    on above them.
    """
    size, codes = values.abs(), torch.signbit(values).to(torch.uint8) << 3
    for code, (low, high) in enumerate(pairwise(_FP4_MAGNITUDES)):
        middle = (low + high) / 2
        codes += size > middle if code % 2 == 0 else size >= middle
    return codes


def _power_above(largest: Tensor, mantissa: float, exponent: int) -> Tensor:
    """The smallest 2^k with largest <= mantissa * 2^(exponent + k), by exponents and so without rounding; 1 for 0."""
    found, power = torch.frexp(largest)
    power = (power - exponent + (found > mantissa)).clamp(-127, 127)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), power), 1.0)


def finite(largest: Tensor) -> Tensor:
    """The largest magnitudes of weights, checked. CheckpointError for infinities and NaN."""
    if not torch.isfinite(largest).all():
        raise CheckpointError("the weights hold infinities or NaN, which cannot be quantised: repair them first")
    return largest


def _check_scales(weights: Tensor, scale: Tensor, wanted: tuple[int, ...], how: str) -> None:
    if tuple(scale.shape) != wanted:
        raise CheckpointError(
            f"scales have shape {list(scale.shape)}: weights of {list(weights.shape)} in {how} need {list(wanted)}"
        )


def _spread(scale_bk: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    return scale_bk.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
