"""What several kernels share: products with float32 sums, a running softmax, rounding, and where rows lie.

Triton's interpreter has wrong products of bfloat16 and cuts numbers off where it should round them to bfloat16, so
under it operands are widened first, and numbers rounded first.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton import supports

INTERPRETED = tl.constexpr(supports.INTERPRETED)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 as another type, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def product(left, right):
    """[M, N] float32 from [M, K] and [K, N]; float32 operands are not cut to fewer bits."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def softmax_step(scores, values, highest, total, sums):
    """Takes a block of keys into a running softmax in powers of two.

    scores: [M, N], -inf where hidden. values: [N, V]. highest, total: [M], of scores and of their powers so far. sums:
    [M, V], weighted. Returns the last three anew.
    """
    higher = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen nothing yet stays at -inf, of which no difference may be taken.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    powers = tl.exp2(scores - anchor[:, None])
    kept = tl.exp2(highest - anchor)
    sums = sums * kept[:, None] + product(narrow(powers, values.dtype), values)
    return higher, total * kept + tl.sum(powers, 1), sums


@triton.jit
def round_even(x):
    """The nearest whole number, of two equally near the even one; exact below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def row_offsets(numbers, inside, sequence, places, table_row, page_size, page_stride, row_stride, KIND: tl.constexpr):
    """Where rows of a sequence begin, int64. KIND 0: side by side from row places[sequence]; 1: on the pages that row
    `sequence` of the table `places` names; 2: in ring places[sequence], at their number modulo its size.
    """
    if KIND == 1:
        page = tl.load(places + sequence * table_row + numbers // page_size, mask=inside, other=0)
        offsets = page.to(tl.int64) * page_stride + (numbers % page_size).to(tl.int64) * row_stride
    elif KIND == 2:
        ring = tl.load(places + sequence).to(tl.int64)
        offsets = ring * page_stride + (numbers % page_size).to(tl.int64) * row_stride
    else:
        offsets = (tl.load(places + sequence) + numbers).to(tl.int64) * row_stride
    return offsets
