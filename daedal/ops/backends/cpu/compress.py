"""What V4's compressors do behind their projections, and rows kept in rings, on native kernels."""

import torch
from torch import Tensor

from daedal.ops.backends.cpu.packed_rows import packed_sizes, row_type
from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.backends.cpu.rows import BACKEND, FLOATS, declines
from daedal.ops.backends.cpu.sparse import moving_numbers, table, whole_numbers
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import PagedRows

MOST_DIM = 2048  # of an entry: what a kernel holds on its stack


def _keep_supports(
    rows: Tensor, starts: tuple[int, ...], pasts: tuple[int, ...], ring: Tensor, states: tuple[int, ...]
) -> str | None:
    if rows.dtype != ring.dtype:
        return f"takes rows in the ring's {ring.dtype}, not {rows.dtype}"
    if not ring.is_contiguous() or not rows.is_contiguous():
        return "takes contiguous tensors"
    return declines(rows, ring)


@REGISTRY.register("keep_in_ring", BACKEND, supports=_keep_supports)
def keep_in_ring(
    rows: Tensor, starts: tuple[int, ...], pasts: tuple[int, ...], ring: Tensor, states: tuple[int, ...]
) -> None:
    stride = rows[0].nbytes if rows.shape[0] else 0
    call(
        "keep_in_ring",
        *(rows, stride, stride, whole_numbers(starts), moving_numbers(pasts, "pasts"), rows.shape[0], len(pasts)),
        *(ring, moving_numbers(states, "states"), ring.shape[1]),
    )


def _pool_supports(
    kv_TW: Tensor,
    gate_TW: Tensor,
    bias_rW: Tensor,
    weight_K: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    ring: Tensor,
    states: tuple[int, ...],
    entries: PagedRows,
    *,
    eps: float,
    overlaps: bool,
) -> str | None:
    wide = (kv_TW, gate_TW, bias_rW, cos_TC, sin_TC, ring)
    if any(tensor.dtype != torch.float32 for tensor in wide):
        return "takes projections, angles and rings in float32"
    if any(dtype not in FLOATS for dtype in (weight_K.dtype, entries.dtype)):
        return "takes a norm's weight and entries in bfloat16 and float32"
    if weight_K.shape[0] > MOST_DIM:
        return f"takes entries of at most {MOST_DIM} numbers, not {weight_K.shape[0]}"
    if kv_TW.stride(1) != 1 or gate_TW.stride(1) != 1 or entries.pool.stride(-1) != 1:
        return "takes dense rows"
    if not all(tensor.is_contiguous() for tensor in (bias_rW, weight_K, cos_TC, sin_TC, ring)):
        return "takes contiguous tensors"
    return declines(*wide, weight_K, entries.pool)


@REGISTRY.register("pool_groups", BACKEND, supports=_pool_supports)
def pool_groups(
    kv_TW: Tensor,
    gate_TW: Tensor,
    bias_rW: Tensor,
    weight_K: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    ring: Tensor,
    states: tuple[int, ...],
    entries: PagedRows,
    *,
    eps: float,
    overlaps: bool,
) -> None:
    call(
        "pool_groups",
        *(kv_TW, kv_TW.stride(0), gate_TW, gate_TW.stride(0), bias_rW, weight_K, TYPES[weight_K.dtype]),
        *(whole_numbers(starts), moving_numbers(pasts, "pasts"), kv_TW.shape[0], len(pasts), bias_rW.shape[0]),
        *(weight_K.shape[0], int(overlaps), float(eps), cos_TC, sin_TC, cos_TC.shape[1]),
        *(ring, moving_numbers(states, "states"), ring.shape[1], row_type(entries), *table(entries)),
        *packed_sizes(entries),
    )
