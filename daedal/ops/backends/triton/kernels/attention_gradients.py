"""Gradients of attention over rows that lie side by side: one kernel for queries, one for keys and values.

Shares are worked out anew from the logarithms that `attend` left, block by block, as in FlashAttention-2 (Dao, 2023,
section 3.1); no program waits for another or adds to what another wrote. Rows of a block are laid out as in `attend`.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow, product
from daedal.ops.backends.triton.kernels.attention import LOG2E, query_parts, rows_at


@triton.jit
def _shares(left_A, left_B, right_A, right_B, logs, visible, scale, PART_B: tl.constexpr):
    """Shares of the softmax [M, N], of queries and keys on either side. logs: broadcast to it, in powers of two."""
    scores = product(left_A, tl.trans(right_A))
    if PART_B > 0:
        scores += product(left_B, tl.trans(right_B))
    return tl.where(visible, tl.exp2(scores * (scale * LOG2E) - logs), 0.0)


@triton.jit
def _write_parts(
    at, first, second, inside, PART_A: tl.constexpr, PART_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Rows at `at` from the two parts that `query_parts` reads."""
    columns = tl.arange(0, BLOCK_A)
    kind = at.dtype.element_ty
    tl.store(at + columns[None, :], narrow(first, kind), mask=inside[:, None] & (columns < PART_A)[None, :])
    if PART_B > 0:
        columns_b = tl.arange(0, BLOCK_B)
        in_part = inside[:, None] & (columns_b < PART_B)[None, :]
        tl.store(at + PART_A + columns_b[None, :], narrow(second, kind), mask=in_part)


@triton.jit
def query_gradient(
    q, keys, values, out, grad, logs, deltas, grad_q, tiles, starts, lengths, places, scale, num_heads,
    q_token, q_head, key_row, key_head, value_row, value_head,
    HEADS: tl.constexpr, PART_A: tl.constexpr, PART_B: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A block of queries and a key head for each program, which goes through the keys that they see.

    out, grad: [T, H, V]; grad_q: [T, H, K]. deltas: float32 [T, H], written: each query's result times its gradient.
    """
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    rows = tl.load(tiles + tl.program_id(0) * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    start, num_keys = tl.load(starts + sequence), tl.load(lengths + sequence)
    num_new = tl.load(starts + sequence + 1) - start
    token, head = rows // HEADS, tl.program_id(1) * HEADS + rows % HEADS
    in_rows = token < num_new
    at = q + (start + token).to(tl.int64)[:, None] * q_token + head[:, None] * q_head
    q_MA, q_MB = query_parts(at, in_rows, PART_A, PART_B, BLOCK_A, BLOCK_B)
    flat = (start + token).to(tl.int64) * num_heads + head
    grad_MV = rows_at(grad + flat[:, None] * VALUE, in_rows, VALUE, BLOCK_V)
    out_MV = rows_at(out + flat[:, None] * VALUE, in_rows, VALUE, BLOCK_V)
    delta = tl.sum(grad_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    tl.store(deltas + flat, delta, mask=in_rows)
    log = tl.load(logs + flat, mask=in_rows, other=0.0)
    seen = tl.where(in_rows, num_keys - num_new + token + 1, 0)
    end = tl.max(seen, 0)
    place = tl.load(places + sequence)
    sums_MA = tl.zeros((BLOCK, BLOCK_A), tl.float32)
    sums_MB = tl.zeros((BLOCK, BLOCK_B), tl.float32)
    for first in range(0, end, STEP):
        numbers = first + tl.arange(0, STEP)
        inside = numbers < end
        row = (place + numbers).to(tl.int64)[:, None]
        key_at = keys + row * key_row + tl.program_id(1) * key_head
        k_NA, k_NB = query_parts(key_at, inside, PART_A, PART_B, BLOCK_A, BLOCK_B)
        value_at = values + row * value_row + tl.program_id(1) * value_head
        v_NV = rows_at(value_at, inside, VALUE, BLOCK_V)
        visible = numbers[None, :] < seen[:, None]
        shares = _shares(q_MA, q_MB, k_NA, k_NB, log[:, None], visible, scale, PART_B)
        of_scores = narrow(shares * (product(grad_MV, tl.trans(v_NV)) - delta[:, None]), k_NA.dtype)
        sums_MA += product(of_scores, k_NA)
        if PART_B > 0:
            sums_MB += product(of_scores, k_NB)
    write = grad_q + flat[:, None] * (PART_A + PART_B)
    _write_parts(write, sums_MA * scale, sums_MB * scale, in_rows, PART_A, PART_B, BLOCK_A, BLOCK_B)


@triton.jit
def key_gradients(
    q, keys, values, grad, logs, deltas, grad_keys, grad_values, tiles, starts, lengths, places, scale, num_heads,
    q_token, q_head, key_row, key_head, value_row, value_head,
    HEADS: tl.constexpr, PART_A: tl.constexpr, PART_B: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head for each program, which goes through the queries that see them, of all its heads.

    grad: [T, H, V]; grad_keys: [S, G, K]; grad_values: [S, G, V]. A key that nobody sees has nought.
    """
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    first_key = tl.load(tiles + tl.program_id(0) * 2 + 1) * BLOCK
    start, num_keys = tl.load(starts + sequence), tl.load(lengths + sequence)
    num_new = tl.load(starts + sequence + 1) - start
    past = num_keys - num_new
    numbers = first_key + tl.arange(0, BLOCK)
    inside = numbers < num_keys
    row = (tl.load(places + sequence) + numbers).to(tl.int64)[:, None]
    key_at = keys + row * key_row + tl.program_id(1) * key_head
    k_NA, k_NB = query_parts(key_at, inside, PART_A, PART_B, BLOCK_A, BLOCK_B)
    v_NV = rows_at(values + row * value_row + tl.program_id(1) * value_head, inside, VALUE, BLOCK_V)
    of_NA = tl.zeros((BLOCK, BLOCK_A), tl.float32)
    of_NB = tl.zeros((BLOCK, BLOCK_B), tl.float32)
    of_NV = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for first in range(tl.maximum(first_key - past, 0) * HEADS, num_new * HEADS, STEP):
        rows = first + tl.arange(0, STEP)
        token, head = rows // HEADS, tl.program_id(1) * HEADS + rows % HEADS
        in_rows = token < num_new
        at = q + (start + token).to(tl.int64)[:, None] * q_token + head[:, None] * q_head
        q_MA, q_MB = query_parts(at, in_rows, PART_A, PART_B, BLOCK_A, BLOCK_B)
        flat = (start + token).to(tl.int64) * num_heads + head
        grad_MV = rows_at(grad + flat[:, None] * VALUE, in_rows, VALUE, BLOCK_V)
        log = tl.load(logs + flat, mask=in_rows, other=0.0)
        delta = tl.load(deltas + flat, mask=in_rows, other=0.0)
        visible = (numbers[:, None] <= (past + token)[None, :]) & in_rows[None, :]
        shares = _shares(k_NA, k_NB, q_MA, q_MB, log[None, :], visible, scale, PART_B)
        of_NV += product(narrow(shares, grad_MV.dtype), grad_MV)
        of_scores = narrow(shares * (product(v_NV, tl.trans(grad_MV)) - delta[None, :]), q_MA.dtype)
        of_NA += product(of_scores, q_MA)
        if PART_B > 0:
            of_NB += product(of_scores, q_MB)
    flat = row * tl.num_programs(1) + tl.program_id(1)
    write = grad_keys + flat * (PART_A + PART_B)
    _write_parts(write, of_NA * scale, of_NB * scale, inside, PART_A, PART_B, BLOCK_A, BLOCK_B)
    _write_parts(grad_values + flat * VALUE, of_NV, of_NV, inside, VALUE, 0, BLOCK_V, 16)
