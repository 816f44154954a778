"""Number formats of weights: today FP8 e4m3 in square blocks, as V3 ships them.

A block of 128 x 128 weights shares one scale; value = code * scale (V3, section 3.3). Scales are float32, or powers of
two stored as e8m0. Reading is exact: both factors are float32 and the product is not rounded again.
"""

import torch
from torch import Tensor

from daedal.errors import CheckpointError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def dequantise_blocks(codes_NK: Tensor, scale_bk: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [N, K] from e4m3 codes and one scale per block; blocks at the edges may be partial."""
    rows, columns = codes_NK.shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale_bk.shape) != wanted:
        raise CheckpointError(
            f"scales have shape {list(scale_bk.shape)}: weights of {list(codes_NK.shape)} in blocks of {list(block)} "
            f"need {list(wanted)}"
        )
    return codes_NK.float() * _spread(scale_bk.float(), block, rows, columns)


def quantise_blocks(weight_NK: Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [N, K], scales float32 per block): each block's largest magnitude maps to 448, an empty one to 1.

    power_of_two rounds scales up, so that nothing overflows.
    """
    rows, columns = weight_NK.shape
    row_blocks, column_blocks = -(-rows // block[0]), -(-columns // block[1])
    padded = weight_NK.float().new_zeros(row_blocks * block[0], column_blocks * block[1])
    padded[:rows, :columns] = weight_NK
    largest_bk = padded.abs().view(row_blocks, block[0], column_blocks, block[1]).amax((1, 3))
    scale_bk = torch.where(largest_bk > 0, largest_bk / FP8_MAX, 1.0)
    if power_of_two:
        scale_bk = torch.exp2(torch.ceil(torch.log2(scale_bk)))
    codes = weight_NK.float() / _spread(scale_bk, block, rows, columns)
    return codes.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_bk


def _spread(scale_bk: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    return scale_bk.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
