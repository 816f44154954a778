"""Rows stored on pages by native kernels, and how packed ones are told to the kernels that read them."""

import torch
from torch import Tensor

from daedal.ops.backends.cpu.elementwise import scatter
from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.backends.cpu.rows import BACKEND, FLOATS, declines
from daedal.ops.packed_rows import PackedRows
from daedal.ops.registry import REGISTRY
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Rows

PACKED = 5  # in place of a type: as in native/packed_rows.h


def packing(rows: Rows | RingRows | None) -> PackedRows | None:
    return rows.packing if isinstance(rows, PagedRows) else None


def row_type(rows: Rows) -> int:
    """The type of rows as kernels number it."""
    return TYPES[numbers_dtype(rows)] if packing(rows) is None else PACKED


def packed_sizes(rows: Rows | RingRows | None) -> tuple[int, int]:
    """Of a row, the numbers packed and those kept exact, as kernels take them; 0 and 0 where rows are plain."""
    packed = packing(rows)
    return (0, 0) if packed is None else (packed.width, packed.exact)


def numbers_dtype(rows: Rows | RingRows) -> torch.dtype:
    """Of what rows stand for."""
    if isinstance(rows, PagedRows):
        return rows.dtype
    return rows.rows.dtype if isinstance(rows, FlatRows) else rows.pool.dtype


def _supports(rows: Tensor, places_T: Tensor, kept: PagedRows) -> str | None:
    if kept.packing is None and rows.dtype != kept.dtype:
        return f"takes rows in the pool's {kept.dtype}, not {rows.dtype}"
    if rows.dtype not in FLOATS:
        return f"takes bfloat16 and float32, not {rows.dtype}"
    if not kept.pool.is_contiguous() or not places_T.is_contiguous():
        return "takes contiguous tensors"
    return declines(rows, places_T, kept.pool)


@REGISTRY.register("keep_on_pages", BACKEND, supports=_supports)
def keep_on_pages(rows: Tensor, places_T: Tensor, kept: PagedRows) -> None:
    if kept.packing is None:
        scatter(kept.pool.flatten(0, 1), places_T, rows)
        return
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    stored = TYPES[rows.dtype], places_T, kept.pool, places_T.shape[0]
    call("keep_packed", rows, rows.stride(0), *stored, *packed_sizes(kept))
