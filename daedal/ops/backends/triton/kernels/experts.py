"""Experts as grouped products over rows in the order of their experts, and the sum over each token's experts.

tiles: [n, 3] int32, of each block of rows its expert (-1: none is left), its first row, and the end of its expert's.
Gradients are grouped products too: of rows by the same weights read the other way, of weights over an expert's rows.
Between them lies the gated unit, row by row. No sum depends on the order in which programs end.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow, product
from daedal.ops.backends.triton.kernels.elementwise import cut, unit_gradients


@triton.jit
def gate_up(
    x,
    tokens,
    tiles,
    weight,
    hidden,
    kept,
    num_summed,
    width,
    x_row,
    limit,
    LIMITED: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden: [N, F], swiglu of both halves of weight [E, 2 F, D] times the rows of x that `tokens` names. kept: [N, 2
    F], where KEPT, both products before the unit.
    """
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
    inside = in_rows[:, None] & in_columns[None, :]
    if KEPT:
        keep = kept + rows.to(tl.int64)[:, None] * 2 * width + columns[None, :]
        tl.store(keep, narrow(opened, kept.dtype.element_ty), mask=inside)
        tl.store(keep + width, narrow(passed, kept.dtype.element_ty), mask=inside)
    if LIMITED:
        opened, passed = cut(opened, passed, limit)
    result = narrow(opened * tl.sigmoid(opened) * passed, hidden.dtype.element_ty)
    tl.store(hidden + rows.to(tl.int64)[:, None] * width + columns[None, :], result, mask=inside)


@triton.jit
def multiply(
    x,
    tokens,
    tiles,
    weight,
    result,
    num_summed,
    num_columns,
    x_row,
    GATHERED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """result: [N, columns], rows of x times their expert's weight [E, columns, summed], where TRANSPOSED [E, summed,
    columns]. GATHERED: row n is the row of x that tokens[n] names.
    """
    expert = tl.load(tiles + tl.program_id(0) * 3)
    if expert < 0:
        return
    rows = (tl.load(tiles + tl.program_id(0) * 3 + 1) + tl.arange(0, BM)).to(tl.int64)
    in_rows = rows < tl.load(tiles + tl.program_id(0) * 3 + 2)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_columns = columns < num_columns
    read = rows
    if GATHERED:
        read = tl.load(tokens + rows, mask=in_rows, other=0).to(tl.int64)
    of_weight = weight + expert.to(tl.int64) * num_columns * num_summed
    if TRANSPOSED:
        of_columns = of_weight + columns[None, :]
    else:
        of_columns = of_weight + columns.to(tl.int64)[None, :] * num_summed
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, num_summed, BK):
        summed = first + tl.arange(0, BK)
        in_summed = summed < num_summed
        x_MK = tl.load(
            x + read[:, None] * x_row + summed[None, :], mask=in_rows[:, None] & in_summed[None, :], other=0.0
        )
        if TRANSPOSED:
            at = summed.to(tl.int64)[:, None] * num_columns
        else:
            at = summed[:, None]
        weight_KN = tl.load(of_columns + at, mask=in_summed[:, None] & in_columns[None, :], other=0.0)
        sums += product(x_MK, weight_KN)
    write = result + rows[:, None] * num_columns + columns[None, :]
    tl.store(write, narrow(sums, result.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def gather_sum(
    rows, places, weights, y, num_columns, WEIGHTED: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """y: [T, D], each token's rows, WEIGHTED by their weights, in the order of `places` [T, A], summed in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, ACTIVE):
        place = tl.load(places + token * ACTIVE + number)
        part = tl.load(rows + place * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * ACTIVE + number).to(tl.float32)
        total += part
    tl.store(y + token * num_columns + columns, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def unit_backward(
    grad_hidden,
    kept,
    weights,
    choices,
    hidden,
    grad_kept,
    grad_weights,
    width,
    limit,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row for each program, from the gradient [N, F] of its unit before it is weighed, and what was kept [N, 2 F].

    choices: each row's place in weights and grad_weights. hidden: [N, F], the unit's result anew, weighed. The gradient
    of a weight is the row's result times its own gradient, which down's weight has already gone into.
    """
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(choices + row)
    weight = tl.load(weights + choice).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        pair = row * 2 * width + columns
        given = tl.load(grad_hidden + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        opened = tl.load(kept + pair, mask=inside, other=0.0).to(tl.float32)
        passed = tl.load(kept + pair + width, mask=inside, other=0.0).to(tl.float32)
        result, of_gate, of_up = unit_gradients(given, opened, passed, limit, LIMITED)
        of_weight += given * result
        kind = hidden.dtype.element_ty
        tl.store(hidden + row * width + columns, narrow(result * weight, kind), mask=inside)
        tl.store(grad_kept + pair, narrow(of_gate * weight, kind), mask=inside)
        tl.store(grad_kept + pair + width, narrow(of_up * weight, kind), mask=inside)
    tl.store(grad_weights + choice, tl.sum(of_weight, 0))


@triton.jit
def weight_gradient(
    left,
    right,
    tokens,
    bounds,
    result,
    num_left,
    num_right,
    left_row,
    right_row,
    LEFT_GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """result: [E, L, R], the sum over an expert's rows n of left[n]^T right[n]; nought where it has none.

    bounds: int32 [E + 1], where each expert's rows begin. One side lies in the order of tokens, the left one where
    LEFT_GATHERED: its row n is the one that tokens[n] names.
    """
    expert = tl.program_id(2)
    end = tl.load(bounds + expert + 1)
    lefts = tl.program_id(0) * BM + tl.arange(0, BM)
    rights = tl.program_id(1) * BN + tl.arange(0, BN)
    in_left, in_right = lefts < num_left, rights < num_right
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(tl.load(bounds + expert), end, BK):
        rows = first + tl.arange(0, BK)
        inside = rows < end
        named = tl.load(tokens + rows, mask=inside, other=0).to(tl.int64)
        rows = rows.to(tl.int64)
        if LEFT_GATHERED:
            left_at = named
            right_at = rows
        else:
            left_at = rows
            right_at = named
        left_KM = tl.load(
            left + left_at[:, None] * left_row + lefts[None, :], mask=inside[:, None] & in_left[None, :], other=0.0
        )
        right_KN = tl.load(
            right + right_at[:, None] * right_row + rights[None, :], mask=inside[:, None] & in_right[None, :], other=0.0
        )
        sums += product(tl.trans(left_KM), right_KN)
    write = (expert.to(tl.int64) * num_left + lefts)[:, None] * num_right + rights[None, :]
    tl.store(result + write, narrow(sums, result.dtype.element_ty), mask=in_left[:, None] & in_right[None, :])
