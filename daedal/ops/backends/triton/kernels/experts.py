"""Experts as two grouped products over rows in the order of their experts, and the sum over each token's experts.

tiles: [n, 3] int32, of each block of rows its expert (-1: none is left), its first row, and the end of its expert's.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow, product


@triton.jit
def gate_up(
    x,
    tokens,
    tiles,
    weight,
    hidden,
    num_summed,
    width,
    x_row,
    limit,
    LIMITED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden: [N, F], swiglu of both halves of weight [E, 2 F, D] times the rows of x that `tokens` names."""
    expert = tl.load(tiles + tl.program_id(0) * 3)
    if expert < 0:
        return
    rows = tl.load(tiles + tl.program_id(0) * 3 + 1) + tl.arange(0, BM)
    in_rows = rows < tl.load(tiles + tl.program_id(0) * 3 + 2)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_columns = columns < width
    read = x + tl.load(tokens + rows, mask=in_rows, other=0).to(tl.int64)[:, None] * x_row
    of_gate = weight + (expert.to(tl.int64) * 2 * width + columns)[None, :] * num_summed
    of_up = of_gate + tl.cast(width, tl.int64) * num_summed
    opened = tl.zeros((BM, BN), tl.float32)
    passed = tl.zeros((BM, BN), tl.float32)
    for first in range(0, num_summed, BK):
        summed = first + tl.arange(0, BK)
        in_summed = summed < num_summed
        x_MK = tl.load(read + summed[None, :], mask=in_rows[:, None] & in_summed[None, :], other=0.0)
        inside = in_summed[:, None] & in_columns[None, :]
        opened += product(x_MK, tl.load(of_gate + summed[:, None], mask=inside, other=0.0))
        passed += product(x_MK, tl.load(of_up + summed[:, None], mask=inside, other=0.0))
    if LIMITED:
        # Comparisons, because a minimum would hide what is not a number.
        opened = tl.where(opened > limit, limit, opened)
        passed = tl.where(passed > limit, limit, passed)
        passed = tl.where(passed < -limit, -limit, passed)
    result = narrow(opened * tl.sigmoid(opened) * passed, hidden.dtype.element_ty)
    write = hidden + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(write, result, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def down(
    hidden,
    tiles,
    weight,
    result,
    width,
    num_columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """result: [N, D], rows of hidden [N, F] times their expert's weight [E, D, F]."""
    expert = tl.load(tiles + tl.program_id(0) * 3)
    if expert < 0:
        return
    rows = (tl.load(tiles + tl.program_id(0) * 3 + 1) + tl.arange(0, BM)).to(tl.int64)
    in_rows = rows < tl.load(tiles + tl.program_id(0) * 3 + 2)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_columns = columns < num_columns
    of_weight = weight + (expert.to(tl.int64) * num_columns + columns)[None, :] * width
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, width, BK):
        summed = first + tl.arange(0, BK)
        in_summed = summed < width
        hidden_MK = tl.load(
            hidden + rows[:, None] * width + summed[None, :], mask=in_rows[:, None] & in_summed[None, :], other=0.0
        )
        weight_KN = tl.load(of_weight + summed[:, None], mask=in_summed[:, None] & in_columns[None, :], other=0.0)
        sums += product(hidden_MK, weight_KN)
    write = result + rows[:, None] * num_columns + columns[None, :]
    tl.store(write, narrow(sums, result.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def gather_sum(rows, places, weights, y, num_columns, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """y: [T, D], each token's rows by their weights, in the order of `places` [T, A], summed in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, ACTIVE):
        place = tl.load(places + token * ACTIVE + number)
        part = tl.load(rows + place * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * ACTIVE + number).to(tl.float32)
    tl.store(y + token * num_columns + columns, narrow(total, y.dtype.element_ty), mask=inside)
