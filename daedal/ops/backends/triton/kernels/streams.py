"""Hyper-connections: one block's input and mixing weights from the residual streams, and the streams behind it.

The product of the streams with their weights is a plain one and comes ready; all that follows from it, the doubly
stochastic matrix included, is worked out in registers.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow


@triton.jit
def _inverse_norm(streams, num_columns, norm_eps, STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    """What divides all streams of a token by their root mean square."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, STREAMS * num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        numbers = tl.load(streams + columns, mask=columns < STREAMS * num_columns, other=0.0).to(tl.float32)
        squares += numbers * numbers
    return tl.rsqrt(tl.sum(squares, 0) / (STREAMS * num_columns) + norm_eps)


@triton.jit
def _balanced(logits, inside, eps, ITERATIONS: tl.constexpr):
    """A matrix of logits made positive by a softmax over its rows, then divided by its columns' and rows' sums."""
    logits = tl.where(inside, logits, -1.0e30)
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    matrix = tl.where(inside, powers / tl.sum(powers, 1)[:, None] + eps, 0.0)
    matrix = matrix / (tl.sum(matrix, 0) + eps)[None, :]
    for _ in range(0, ITERATIONS - 1):
        matrix = matrix / (tl.sum(matrix, 1) + eps)[:, None]
        matrix = matrix / (tl.sum(matrix, 0) + eps)[None, :]
    return matrix


@triton.jit
def collapse(
    streams, mixes, base, scale, x, post, comb, num_columns, norm_eps, eps,
    FULL: tl.constexpr, ITERATIONS: tl.constexpr, STREAMS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token for each program. FULL: with post [M] and comb [M, M]; else only x, for the head."""
    token = tl.program_id(0).to(tl.int64)
    streams += token * STREAMS * num_columns
    inverse = _inverse_norm(streams, num_columns, norm_eps, STREAMS, BLOCK)
    slots = tl.arange(0, SLOTS)
    in_slots = slots < STREAMS
    if FULL:
        mixes += token * (2 + STREAMS) * STREAMS
        wide = 2 * STREAMS + slots[:, None] * STREAMS + slots[None, :]
        inside = in_slots[:, None] & in_slots[None, :]
        logits = tl.load(mixes + wide, mask=inside, other=0.0) * inverse * tl.load(scale + 2)
        logits += tl.load(base + wide, mask=inside, other=0.0)
        matrix = _balanced(logits, inside, eps, ITERATIONS)
        write = comb + token * STREAMS * STREAMS + slots[:, None] * STREAMS + slots[None, :]
        tl.store(write, matrix, mask=inside)
        leaving = tl.load(mixes + STREAMS + slots, mask=in_slots, other=0.0) * inverse * tl.load(scale + 1)
        leaving += tl.load(base + STREAMS + slots, mask=in_slots, other=0.0)
        tl.store(post + token * STREAMS + slots, 2.0 * tl.sigmoid(leaving), mask=in_slots)
    else:
        mixes += token * STREAMS
    entering = tl.load(mixes + slots, mask=in_slots, other=0.0) * inverse * tl.load(scale)
    entering = tl.sigmoid(entering + tl.load(base + slots, mask=in_slots, other=0.0)) + eps
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for stream in tl.static_range(STREAMS):
            share = tl.sum(tl.where(slots == stream, entering, 0.0), 0)
            part = tl.load(streams + stream * num_columns + columns, mask=columns < num_columns, other=0.0)
            total += share * part.to(tl.float32)
        tl.store(x + token * num_columns + columns, narrow(total, x.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def expand(y, streams, post, comb, result, num_columns, STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    """A run of columns of a token for each program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    given = tl.load(y + token * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    first = token * STREAMS
    for stream in tl.static_range(STREAMS):
        total = given * tl.load(post + first + stream)
        for source in tl.static_range(STREAMS):
            part = tl.load(streams + (first + source) * num_columns + columns, mask=inside, other=0.0)
            total += part.to(tl.float32) * tl.load(comb + (first + source) * STREAMS + stream)
        write = result + (first + stream) * num_columns + columns
        tl.store(write, narrow(total, result.dtype.element_ty), mask=inside)
