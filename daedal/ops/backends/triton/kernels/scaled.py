"""Products of rounded factors: codes with one scale for a group, and the product of two such matrices.

The rounding is that of `ops.arithmetic`, bit for bit: steps are powers of two, halves go to even, so a code is exact
before it is stored. Groups lie along the summed axis; across it they are of one row or of a whole block.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow, product, round_even


@triton.jit
def _power_of_two(exponent):
    """2^exponent, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(numbers, largest, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(numbers / scale, scale) for the largest magnitude of their group; the least scale is 2^-100."""
    if POWER_OF_TWO:
        bits = largest.to(tl.int32, bitcast=True)
        # LARGEST is 1.75 * 2^8: one more where the mantissa is above 1.75.
        exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        exponent = tl.where(largest > 0, tl.maximum(exponent, -100), 0)
        scale = _power_of_two(exponent)
        numbers = numbers * _power_of_two(-exponent)
    else:
        scale = tl.where(largest > 0, tl.maximum(tl.div_rn(largest, LARGEST), 7.888609052210118e-31), 1.0)
        numbers = tl.div_rn(numbers, scale + tl.zeros_like(numbers))
    finite = largest < float("inf")
    return tl.where(finite, numbers, float("nan")), tl.where(finite, scale, float("nan"))


@triton.jit
def quantise(
    x,
    codes,
    scales,
    num_rows,
    num_columns,
    x_row,
    x_column,
    num_groups,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    LARGEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """ROWS rows of one group of columns for each program; SHARED: with one scale. scales: [rows or blocks, groups]."""
    block, group = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = group * GROUP + tl.arange(0, GROUP)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows[:, None] * x_row + columns[None, :].to(tl.int64) * x_column
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # As whole numbers magnitudes keep their order, and infinities and NaN lie above all others.
    bits = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    highest = tl.max(bits, 1)
    if SHARED:
        highest = tl.zeros_like(highest) + tl.max(highest, 0)
    largest = highest.to(tl.float32, bitcast=True)[:, None]
    scaled, scale = _scaled(numbers, largest, LARGEST, POWER_OF_TWO)
    if INTEGER:
        rounded = round_even(scaled)
    else:
        magnitude = tl.maximum(tl.abs(scaled), 0.015625).to(tl.int32, bitcast=True)
        exponent = (magnitude >> 23) - 127 - 3
        rounded = round_even(scaled * _power_of_two(-exponent)) * _power_of_two(exponent)
    write = codes + rows[:, None] * num_columns + columns[None, :]
    tl.store(write, rounded.to(codes.dtype.element_ty), mask=inside)
    if SHARED:
        places, alone = rows * 0 + block, rows == block.to(tl.int64) * ROWS
    else:
        places, alone = rows, rows < num_rows
    tl.store(scales + places[:, None] * num_groups + group, scale, mask=alone[:, None])


@triton.jit
def multiply(
    left,
    left_scales,
    right,
    right_scales,
    result,
    num_rows,
    num_columns,
    num_summed,
    num_groups,
    left_across,
    right_across,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """[M, N] from codes [M, K] and [N, K]: a product for each group, scaled, and summed in float32."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    steps = tl.arange(0, GROUP)
    in_rows, in_columns = rows < num_rows, columns < num_columns
    sums = tl.zeros((BM, BN), tl.float32)
    for group in range(0, num_groups):
        summed = group * GROUP + steps
        in_summed = summed < num_summed
        left_MK = tl.load(
            left + rows[:, None] * num_summed + summed[None, :], mask=in_rows[:, None] & in_summed[None, :], other=0.0
        )
        right_KN = tl.load(
            right + columns[None, :] * num_summed + summed[:, None],
            mask=in_columns[None, :] & in_summed[:, None],
            other=0.0,
        )
        if INTEGER:
            part = tl.dot(left_MK, right_KN).to(tl.float32)
        else:
            part = product(left_MK, right_KN)
        by_row = tl.load(left_scales + (rows // left_across) * num_groups + group, mask=in_rows, other=0.0)
        by_column = tl.load(right_scales + (columns // right_across) * num_groups + group, mask=in_columns, other=0.0)
        sums += part * by_row[:, None] * by_column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(
        result + rows[:, None] * num_columns + columns[None, :], narrow(sums, result.dtype.element_ty), mask=inside
    )
