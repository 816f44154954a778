"""Attention of each token over entries, all or chosen, and a window; and how entries are scored and chosen.

All heads share one row per key, so a token's heads are the rows of a block, and its own choice of keys costs no more
than a common one. Scores of a choice are kept in memory, and the best are found by their bits: eight passes of four
bits give the lowest score that is taken, one more pass takes what lies above it and the first of its equals.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import product, row_offsets, softmax_step
from daedal.ops.backends.triton.kernels.attention import LOG2E, query_parts, write_out


@triton.jit
def _take_keys(
    q_MA, q_MB, rows, offsets, inside, scale, highest, total, sums,
    PART_A: tl.constexpr, PART_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One block of keys at `offsets` into the running softmax; the first part of a key is its value."""
    k_NA, k_NB = query_parts(rows + offsets[:, None], inside, PART_A, PART_B, BLOCK_A, BLOCK_B)
    scores = product(q_MA, tl.trans(k_NA))
    if PART_B > 0:
        scores += product(q_MB, tl.trans(k_NB))
    scores = tl.where(inside[None, :], scores * (scale * LOG2E), float("-inf"))
    return softmax_step(scores, k_NA, highest, total, sums)


@triton.jit
def attend_sparse(
    q, out, logs, sequences, positions, entries, entry_places, chosen, window, window_places, window_firsts,
    scale, chunk, num_chosen, num_tokens, num_heads, rate, span, q_token, q_head,
    entry_table, entry_size, entry_page, entry_row, window_table, window_size, window_page, window_row,
    ENTRIES: tl.constexpr, ENTRY_KIND: tl.constexpr, CHOSEN: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_KIND: tl.constexpr,
    PART_A: tl.constexpr, PART_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A token, a block of its heads and a stretch of its entries for each program; the first one takes the window."""
    token = tl.program_id(0).to(tl.int64)
    sequence, position = tl.load(sequences + token), tl.load(positions + token)
    heads = tl.program_id(1) * BM + tl.arange(0, BM)
    in_rows = heads < num_heads
    at = q + token * q_token + heads[:, None] * q_head
    q_MA, q_MB = query_parts(at, in_rows, PART_A, PART_B, BLOCK_A, BLOCK_B)
    highest = tl.zeros((BM,), tl.float32) + float("-inf")
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BLOCK_A), tl.float32)
    if ENTRIES:
        seen = (position + 1) // rate
        first = tl.program_id(2) * chunk
        if CHOSEN:
            end = tl.minimum(num_chosen, first + chunk)
        else:
            end = tl.minimum(seen, first + chunk)
        for block in range(first, end, BN):
            numbers = block + tl.arange(0, BN)
            inside = numbers < end
            if CHOSEN:
                numbers = tl.load(chosen + token * num_chosen + numbers, mask=inside, other=-1).to(tl.int32)
                inside = (numbers >= 0) & (numbers < seen)
                numbers = tl.where(inside, numbers, 0)
            offsets = row_offsets(
                numbers, inside, sequence, entry_places, entry_table, entry_size, entry_page, entry_row, ENTRY_KIND
            )
            highest, total, sums = _take_keys(
                q_MA, q_MB, entries, offsets, inside, scale, highest, total, sums,
                PART_A, PART_B, BLOCK_A, BLOCK_B,
            )  # fmt: skip
    if WINDOW:
        if tl.program_id(2) == 0:
            low = tl.maximum(position - span + 1, tl.load(window_firsts + sequence))
            for block in range(low, position + 1, BN):
                numbers = block + tl.arange(0, BN)
                inside = numbers <= position
                offsets = row_offsets(
                    numbers, inside, sequence, window_places, window_table, window_size, window_page, window_row,
                    WINDOW_KIND,
                )  # fmt: skip
                highest, total, sums = _take_keys(
                    q_MA, q_MB, window, offsets, inside, scale, highest, total, sums,
                    PART_A, PART_B, BLOCK_A, BLOCK_B,
                )  # fmt: skip
    flat = (tl.program_id(2).to(tl.int64) * num_tokens + token) * num_heads + heads
    write_out(sums, highest, total, flat, in_rows, out, logs, True, PART_A, BLOCK_A)


@triton.jit
def score_entries(
    q, weights, scores, sequences, seen, keys, places, q_token, q_head, weight_token, score_row, num_heads, num_columns,
    table_row, page_size, key_page, key_row,
    KIND: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scores: [T, S], for each token and BN entries a program; entries that the token does not see are passed over."""
    token = tl.program_id(0).to(tl.int64)
    num_seen = tl.load(seen + token)
    if tl.program_id(1) * BN >= num_seen:
        return
    numbers = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = numbers < num_seen
    heads, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_K)
    in_heads, in_columns = heads < num_heads, columns < num_columns
    at = q + token * q_token + heads[:, None] * q_head + columns[None, :]
    q_IK = tl.load(at, mask=in_heads[:, None] & in_columns[None, :], other=0.0)
    sequence = tl.load(sequences + token)
    offsets = row_offsets(numbers, inside, sequence, places, table_row, page_size, key_page, key_row, KIND)
    k_KN = tl.load(keys + offsets[None, :] + columns[:, None], mask=inside[None, :] & in_columns[:, None], other=0.0)
    products = product(q_IK, k_KN)
    # A comparison, because a maximum would hide what is not a number.
    products = tl.where(products < 0.0, 0.0, products)
    shares = tl.load(weights + token * weight_token + heads, mask=in_heads, other=0.0).to(tl.float32)
    tl.store(scores + token * score_row + numbers, tl.sum(products * shares[:, None], 0), mask=inside)


@triton.jit
def _ordered(scores):
    """int32 in the order of the scores; both zeros are one, and NaN lies above all or below all."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _lowest_taken(scores, num_seen, count, BLOCK: tl.constexpr):
    """(bits of the lowest score that is among the `count` best, how many lie above it), both [1].

    Digits are those of the bits with their sign turned over, which count upwards; comparisons have signs, because not
    every chip compares numbers without.
    """
    digits = tl.arange(0, 16)
    lowest = tl.zeros((1,), tl.int32)
    above = tl.zeros((1,), tl.int32)
    for step in tl.static_range(8):
        limits = (lowest | (digits << (28 - 4 * step))) ^ -2147483648
        counts = tl.zeros((16,), tl.int32)
        for block in range(0, num_seen, BLOCK):
            columns = block + tl.arange(0, BLOCK)
            bits = _ordered(tl.load(scores + columns, mask=columns < num_seen, other=0.0))
            reached = (bits[:, None] >= limits[None, :]) & (columns < num_seen)[:, None]
            counts += tl.sum(reached.to(tl.int32), 0)
        # Counts fall with the digit: the last that still reaches `count` is the digit of the lowest one taken.
        digit = tl.sum((counts >= count).to(tl.int32), 0) - 1
        above = tl.sum(tl.where(digits == digit + 1, counts, 0), 0) + tl.where(digit == 15, above, 0)
        lowest = lowest | (digit << (28 - 4 * step))
    return lowest ^ -2147483648, above


@triton.jit
def take_best(scores, seen, chosen, score_row, count, width, BLOCK: tl.constexpr):
    """chosen: [T, A] int64, of each token's first `seen` scores the columns of the `count` best, ascending, ties to the
    lowest; what is left over keeps what it held.
    """
    token = tl.program_id(0).to(tl.int64)
    num_seen = tl.load(seen + token)
    scores += token * score_row
    chosen += token * width
    lowest, above = _lowest_taken(scores, tl.where(num_seen <= count, 0, num_seen), count, BLOCK)
    num_taken, num_equal = 0, 0
    for block in range(0, num_seen, BLOCK):
        columns = block + tl.arange(0, BLOCK)
        inside = columns < num_seen
        bits = _ordered(tl.load(scores + columns, mask=inside, other=0.0))
        equal = inside & (bits == lowest)
        place = num_equal + tl.cumsum(equal.to(tl.int32), 0) - 1
        all_taken = columns * 0 + num_seen <= count
        taken = inside & (all_taken | (bits > lowest) | (equal & (place < count - above)))
        write = num_taken + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + write, columns.to(tl.int64), mask=taken)
        num_taken += tl.sum(taken.to(tl.int32), 0)
        num_equal += tl.sum(equal.to(tl.int32), 0)
