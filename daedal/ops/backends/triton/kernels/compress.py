"""V4's compressors behind their projections: an entry from each group of tokens, and the rows kept for later groups.

A program goes through its group's tokens with a softmax of its own for each column. Columns go in adjacent pairs, as
they are rotated: even ones in one block, odd ones in another.
"""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow


@triton.jit
def _weighed(number, gate, highest, total, sums):
    """Takes a token's number and gate into the running softmax of each column."""
    higher = tl.maximum(highest, gate)
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    power, kept = tl.exp(gate - anchor), tl.exp(highest - anchor)
    return higher, total * kept + power, sums * kept + power * number


@triton.jit
def pool(
    kv, gate, bias, weight, cos, sin, ring, entries, groups, starts, pasts, states, table, kv_token, gate_token,
    ring_state, ring_row, ring_half, ring_size, table_row, page_size, entry_page, entry_row, num_turned, eps,
    RATE: tl.constexpr, REACH: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An entry for each program. groups: [N, 2], the sequence of each and its number there. REACH: tokens of an entry,
    RATE or, where groups overlap, twice that; then the tokens before give the first DIM of WIDTH columns, its own the
    last. BLOCK: pairs of columns.
    """
    sequence = tl.load(groups + tl.program_id(0) * 2)
    number = tl.load(groups + tl.program_id(0) * 2 + 1)
    start, past = tl.load(starts + sequence), tl.load(pasts + sequence)
    held = ring + tl.load(states + sequence).to(tl.int64) * ring_state
    pairs = tl.arange(0, BLOCK)
    inside = pairs < DIM // 2
    even, odd = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    even_total, odd_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    even_highest = tl.zeros((BLOCK,), tl.float32) + float("-inf")
    odd_highest = tl.zeros((BLOCK,), tl.float32) + float("-inf")
    for step in range(0, REACH):
        position = (number + 1) * RATE - REACH + step
        columns = 2 * pairs + tl.where(step < REACH - RATE, 0, WIDTH - DIM)
        everywhere = pairs * 0 + position
        new = inside & (everywhere >= past)
        old = inside & (everywhere >= 0) & (everywhere < past)
        token = (start + tl.maximum(position - past, 0)).to(tl.int64)
        row = (tl.maximum(position, 0) % ring_size).to(tl.int64) * ring_row
        raised = bias + (tl.maximum(position, 0) % RATE) * WIDTH + columns
        at_kv, at_gate = kv + token * kv_token + columns, gate + token * gate_token + columns
        at_held = held + row + columns
        # Of the two places where a row may lie one is masked; -inf weighs a row before the first at nothing.
        x = tl.load(at_kv, mask=new, other=0.0) + tl.load(at_held, mask=old, other=0.0)
        opened = tl.load(at_gate, mask=new, other=0.0) + tl.load(raised, mask=new, other=0.0)
        opened += tl.load(at_held + ring_half, mask=old, other=0.0)
        opened = tl.where(new | old, opened, float("-inf"))
        even_highest, even_total, even = _weighed(x, opened, even_highest, even_total, even)
        x = tl.load(at_kv + 1, mask=new, other=0.0) + tl.load(at_held + 1, mask=old, other=0.0)
        opened = tl.load(at_gate + 1, mask=new, other=0.0) + tl.load(raised + 1, mask=new, other=0.0)
        opened += tl.load(at_held + ring_half + 1, mask=old, other=0.0)
        opened = tl.where(new | old, opened, float("-inf"))
        odd_highest, odd_total, odd = _weighed(x, opened, odd_highest, odd_total, odd)
    even = tl.where(inside, even / even_total, 0.0)
    odd = tl.where(inside, odd / odd_total, 0.0)
    scale = tl.rsqrt((tl.sum(even * even, 0) + tl.sum(odd * odd, 0)) / DIM + eps)
    even *= scale * tl.load(weight + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    odd *= scale * tl.load(weight + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    angle = (start + (number + 1) * RATE - 1 - past).to(tl.int64) * num_turned + pairs - (DIM // 2 - num_turned)
    turned = inside & (pairs >= DIM // 2 - num_turned)
    turn = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    lift = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    page = tl.load(table + sequence * table_row + number // page_size).to(tl.int64)
    write = entries + page * entry_page + (number % page_size).to(tl.int64) * entry_row + 2 * pairs
    tl.store(write, narrow(even * turn - odd * lift, entries.dtype.element_ty), mask=inside)
    tl.store(write + 1, narrow(odd * turn + even * lift, entries.dtype.element_ty), mask=inside)


@triton.jit
def keep(
    kv, gate, bias, ring, kept, kv_token, gate_token, ring_state, ring_row, ring_half,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of columns of a token for each program. kept: [N, 4], the token, its row of the bias, its ring and its row
    in that.
    """
    kept += tl.program_id(0) * 4
    token, phase = tl.load(kept).to(tl.int64), tl.load(kept + 1)
    write = ring + tl.load(kept + 2).to(tl.int64) * ring_state + tl.load(kept + 3).to(tl.int64) * ring_row
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    number = tl.load(kv + token * kv_token + columns, mask=inside, other=0.0)
    opened = tl.load(gate + token * gate_token + columns, mask=inside, other=0.0)
    opened += tl.load(bias + phase * WIDTH + columns, mask=inside, other=0.0)
    tl.store(write + columns, number, mask=inside)
    tl.store(write + ring_half + columns, opened, mask=inside)
