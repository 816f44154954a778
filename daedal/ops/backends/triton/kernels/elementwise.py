"""Norms, rotation and gated units, with their gradients: one pass over memory each, float32 inside."""

import triton
import triton.language as tl

from daedal.ops.backends.triton.kernels.arithmetic import narrow


@triton.jit
def rms_norm(
    x, weight, y, inverse, num_columns, x_row, eps, WEIGHTED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """A row for each program. inverse: where KEPT, what each row was multiplied by."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    numbers = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / num_columns + eps)
    normed = numbers * scale
    if WEIGHTED:
        normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * num_columns + columns, narrow(normed, y.dtype.element_ty), mask=inside)
    if KEPT:
        tl.store(inverse + row, scale)


@triton.jit
def rms_norm_backward(
    grad, x, weight, inverse, grad_x, partial, num_rows, num_columns, x_row, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program takes every n-th row. partial: [programs, D], its share of the weight's gradient."""
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    share = tl.zeros((BLOCK,), tl.float32)
    for number in range(first, num_rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        given = tl.load(grad + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row)
        normed = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32) * scale
        along = given
        if WEIGHTED:
            share += given * normed
            along = given * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        along -= normed * (tl.sum(along * normed, 0) / num_columns)
        tl.store(grad_x + row * num_columns + columns, narrow(along * scale, grad_x.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(partial + first.to(tl.int64) * num_columns + columns, share, mask=inside)


@triton.jit
def rotate(
    x,
    cos,
    sin,
    y,
    num_heads,
    x_token,
    x_head,
    angle_token,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of a token for each program; BACK turns the other way, which is the gradient."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    inside = (heads < num_heads)[:, None] & (pairs < PAIRS)[None, :]
    if INTERLEAVED:
        first = pairs * 2
        second = first + 1
    else:
        first = pairs
        second = pairs + PAIRS
    turn = tl.load(cos + token * angle_token + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)[None, :]
    lift = tl.load(sin + token * angle_token + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)[None, :]
    if BACK:
        lift = -lift
    read = x + token * x_token + heads[:, None] * x_head
    left = tl.load(read + first[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(read + second[None, :], mask=inside, other=0.0).to(tl.float32)
    write = y + (token * num_heads + heads[:, None]) * (2 * PAIRS)
    tl.store(write + first[None, :], narrow(left * turn - right * lift, y.dtype.element_ty), mask=inside)
    tl.store(write + second[None, :], narrow(right * turn + left * lift, y.dtype.element_ty), mask=inside)


@triton.jit
def cut(opened, passed, limit):
    """Comparisons, because a minimum would hide what is not a number."""
    opened = tl.where(opened > limit, limit, opened)
    passed = tl.where(passed > limit, limit, passed)
    return opened, tl.where(passed < -limit, -limit, passed)


@triton.jit
def unit_gradients(given, opened, passed, limit, LIMITED: tl.constexpr):
    """(result, gradient of gate, of up) of a gated unit, float32; what the limit cuts off has none."""
    gate, up = opened, passed
    if LIMITED:
        gate, up = cut(opened, passed, limit)
    share = tl.sigmoid(gate)
    of_gate = given * up * share * (1.0 + gate * (1.0 - share))
    of_up = given * gate * share
    if LIMITED:
        of_gate = tl.where(gate == opened, of_gate, 0.0)
        of_up = tl.where(up == passed, of_up, 0.0)
    return gate * share * up, of_gate, of_up


@triton.jit
def swiglu(gate, up, y, num_columns, gate_row, up_row, limit, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    """A run of columns of a row for each program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    opened = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    if LIMITED:
        opened, passed = cut(opened, passed, limit)
    result = opened * tl.sigmoid(opened) * passed
    tl.store(y + row * num_columns + columns, narrow(result, y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    grad, gate, up, grad_gate, grad_up, num_columns, gate_row, up_row, limit, LIMITED: tl.constexpr, BLOCK: tl.constexpr
):
    """As `swiglu`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    given = tl.load(grad + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    _, of_gate, of_up = unit_gradients(given, opened, passed, limit, LIMITED)
    write = row * num_columns + columns
    tl.store(grad_gate + write, narrow(of_gate, grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + write, narrow(of_up, grad_up.dtype.element_ty), mask=inside)
