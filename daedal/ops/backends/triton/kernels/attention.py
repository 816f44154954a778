"""Attention of a ragged batch over rows that lie side by side or on pages, and the merging of partial results.

Queries of all heads that share a key head are rows of one matrix, token by token: one query of 128 heads in the
absorbed form of latent attention fills a block as 128 tokens of one head do. A key's columns are read in two parts, so
that both are powers of two (512 and 64). Long contexts are split over programs; `merge` joins what they found.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow, product, row_offsets, softmax_step

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_parts(at, in_rows, PART_A: tl.constexpr, PART_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Rows at `at` in two parts: columns up to PART_A, and the PART_B columns behind them."""
    columns = tl.arange(0, BLOCK_A)
    columns_b = tl.arange(0, BLOCK_B)
    first = tl.load(at + columns[None, :], mask=in_rows[:, None] & (columns < PART_A)[None, :], other=0.0)
    second = tl.load(at + PART_A + columns_b[None, :], mask=in_rows[:, None] & (columns_b < PART_B)[None, :], other=0.0)
    return first, second


@triton.jit
def rows_at(at, in_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows at `at` of WIDTH columns in one part."""
    columns = tl.arange(0, BLOCK)
    return tl.load(at + columns[None, :], mask=in_rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def attend(
    q, keys, values, out, logs, tiles, starts, lengths, places, scale, chunk, num_tokens, num_heads, q_token, q_head,
    key_page, key_row, key_head, value_page, value_row, value_head, page_size, table_row,
    KIND: tl.constexpr, SHARED: tl.constexpr, LOGGED: tl.constexpr, HEADS: tl.constexpr,
    PART_A: tl.constexpr, PART_B: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of queries, a key head and a stretch of keys for each program. SHARED: a key's first part is its value.
    HEADS: query heads of a key head. LOGGED: who joins parts, or looks for gradients, wants to know their weight.
    """
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    rows = tl.load(tiles + tl.program_id(0) * 2 + 1) * BM + tl.arange(0, BM)
    start, num_keys = tl.load(starts + sequence), tl.load(lengths + sequence)
    num_new = tl.load(starts + sequence + 1) - start
    token, head = rows // HEADS, tl.program_id(1) * HEADS + rows % HEADS
    in_rows = token < num_new
    at = q + (start + token).to(tl.int64)[:, None] * q_token + head[:, None] * q_head
    q_MA, q_MB = query_parts(at, in_rows, PART_A, PART_B, BLOCK_A, BLOCK_B)
    first_key = tl.program_id(2) * chunk
    seen = tl.minimum(tl.where(in_rows, num_keys - num_new + token + 1, 0), first_key + chunk)
    end = tl.max(seen, 0)
    highest = tl.zeros((BM,), tl.float32) + float("-inf")
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BLOCK_V), tl.float32)
    for block in range(first_key, end, BN):
        numbers = block + tl.arange(0, BN)
        inside = numbers < end
        offsets = row_offsets(numbers, inside, sequence, places, table_row, page_size, key_page, key_row, KIND)
        k_NA, k_NB = query_parts(
            keys + offsets[:, None] + tl.program_id(1) * key_head, inside, PART_A, PART_B, BLOCK_A, BLOCK_B
        )
        scores = product(q_MA, tl.trans(k_NA))
        if PART_B > 0:
            scores += product(q_MB, tl.trans(k_NB))
        scores = tl.where(numbers[None, :] < seen[:, None], scores * (scale * LOG2E), float("-inf"))
        if SHARED:
            v_NV = k_NA
        else:
            offsets = row_offsets(numbers, inside, sequence, places, table_row, page_size, value_page, value_row, KIND)
            v_NV = rows_at(values + offsets[:, None] + tl.program_id(1) * value_head, inside, VALUE, BLOCK_V)
        highest, total, sums = softmax_step(scores, v_NV, highest, total, sums)
    flat = (tl.program_id(2).to(tl.int64) * num_tokens + start + token) * num_heads + head
    write_out(sums, highest, total, flat, in_rows, out, logs, LOGGED, VALUE, BLOCK_V)


@triton.jit
def write_out(
    sums, highest, total, flat, in_rows, out, logs, LOGGED: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """What a program found for its queries, at rows `flat`; where LOGGED the logarithm of its weight too."""
    columns = tl.arange(0, BLOCK_V)
    total = tl.where(total == 0.0, 1.0, total)  # of a row that saw nothing: its highest stays at -inf
    result = sums / total[:, None]
    inside = in_rows[:, None] & (columns < VALUE)[None, :]
    tl.store(out + flat[:, None] * VALUE + columns[None, :], narrow(result, out.dtype.element_ty), mask=inside)
    if LOGGED:
        tl.store(logs + flat, highest + tl.log2(total), mask=in_rows)


@triton.jit
def merge(
    parts,
    logs,
    sinks,
    out,
    num_rows,
    num_heads,
    num_splits,
    SINKS: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out: [T H, V] from parts [splits, T H, V] and their weights, in powers of two; a sink takes its share."""
    row = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    weights = tl.load(logs + splits * num_rows + row, mask=splits < num_splits, other=float("-inf"))
    highest = tl.max(weights, 0)
    if SINKS:
        sink = tl.load(sinks + row % num_heads).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(weights - anchor), 0)
    if SINKS:
        total += tl.exp2(sink - anchor)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for number in range(0, num_splits):
        place = number * num_rows + row
        part = tl.load(parts + place * VALUE + columns, mask=columns < VALUE, other=0.0)
        sums += part * tl.exp2(tl.load(logs + place) - anchor)
    result = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * VALUE + columns, narrow(result, out.dtype.element_ty), mask=columns < VALUE)
