"""Attention on native kernels: one kernel for every form, from the absorbed decode step to the prefill of many heads.

Keys and values are read where they lie, on pages or side by side, through tables and lengths that the kernel looks up
when it runs: a recorded step is replayed as the sequences grow. Scratch follows from shapes and from what the tables
can hold, not from lengths. The method and its sources are told in `native/attention.h`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.backends.cpu.packed_rows import numbers_dtype, packed_sizes, packing, row_type
from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.backends.cpu.rows import BACKEND, FLOATS, declines
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Rows

# Query rows of one unit of work: all heads of the widest latent attention, so that a key is read once for them; and so
# many tokens of a prompt that copying their keys once costs little (128 were a tenth slower).
UNIT_ROWS = 256
# Keys of a block and of the shortest chunk, and the most chunks of a unit: as in native/attention.h.
BLOCK, SHORTEST, CHUNKS = 128, 64, 64
# Rows side by side are one page longer than any sequence.
ENDLESS = 1 << 30


def _attention_supports(
    q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float
) -> str | None:
    read = [rows for rows in (keys, values) if not isinstance(rows, int)]
    held = [_memory(rows) for rows in read]
    dtypes = [numbers_dtype(rows) for rows in read]
    for dtype in (q_THK.dtype, *dtypes):
        if dtype not in FLOATS:
            return f"takes bfloat16 and float32, not {dtype}"
    if any(tensor.stride(-1) != 1 for tensor in held):
        return "rows are not dense"
    if dtypes[0] != dtypes[-1]:
        return f"keys are {dtypes[0]}, values {dtypes[-1]}"
    if len(read) > 1 and any(packing(rows) is not None for rows in read):
        return "takes packed rows whose first numbers are the values"
    if not 1e-6 < scale < 1e6:
        return f"a scale of {scale} is out of its range"
    return declines(q_THK, *held)


@REGISTRY.register("attention", BACKEND, supports=_attention_supports)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    if q_THK.stride(-1) != 1:
        q_THK = q_THK.contiguous()
    num_tokens, num_heads, key_dim = q_THK.shape
    memory = _memory(keys)
    num_groups = memory.shape[-2] if _has_heads(keys) else 1
    value_dim = values if isinstance(values, int) else _memory(values).shape[-1]
    lengths_B, key_place, capacity = _place(keys)
    _, value_place, _ = _place(keys if isinstance(values, int) else values)
    out_THV = torch.empty((num_tokens, num_heads, value_dim), dtype=q_THK.dtype)
    rows = max((end - start for start, end in pairwise(starts)), default=0) * (num_heads // num_groups)
    unit_rows = min(UNIT_ROWS, -(-max(rows, 1) // 16) * 16)
    threads, slots = torch.get_num_threads(), min(CHUNKS, -(-max(capacity, 1) // SHORTEST))
    call(
        "attention",
        q_THK,
        q_THK.stride(0),
        q_THK.stride(1),
        TYPES[q_THK.dtype],
        out_THV,
        torch.tensor(starts, dtype=torch.int32),
        len(starts) - 1,
        num_heads,
        num_groups,
        key_dim,
        value_dim,
        float(scale),
        lengths_B,
        row_type(keys),
        *key_place,
        *value_place,
        threads,
        slots,
        unit_rows,
        *_scratch(threads, slots, unit_rows, key_dim, value_dim),
        *packed_sizes(keys),
    )
    return out_THV


def _scratch(threads: int, slots: int, unit_rows: int, key_dim: int, value_dim: int) -> list[Tensor]:
    """Packed queries, copied keys, weights, and sums of chunks."""
    wide_key, wide_value = (-(-dim // 32) * 32 for dim in (key_dim, value_dim))
    sizes = (
        unit_rows * wide_key,
        BLOCK * wide_key,
        unit_rows * BLOCK,
        (2 + slots) * unit_rows // 16 * (32 + 16 * wide_value),
    )
    return [torch.empty(threads * size, dtype=torch.float32) for size in sizes]


def _place(rows: Rows) -> tuple[Tensor, list[Tensor | int], int]:
    """Lengths, the kernel's seven arguments that say where rows lie, and how many a sequence can have."""
    if isinstance(rows, PagedRows):
        pool, pages = rows.pool, rows.pages
        head_stride = pool.stride(2) if _has_heads(rows) else 0
        table_BP, width = pages.table_BP, pages.table_BP.shape[1]
        strides = (pool.stride(0), pool.stride(1), head_stride)
        return pages.lengths_B, [pool, *strides, table_BP, width, pages.page_size], width * pages.page_size
    memory = rows.rows
    head_stride = memory.stride(1) if _has_heads(rows) else 0
    firsts_B = torch.tensor(rows.starts[:-1], dtype=torch.int32)
    lengths_B = torch.tensor(rows.lengths, dtype=torch.int32)
    strides = (memory.stride(0), memory.stride(0), head_stride)
    return lengths_B, [memory, *strides, firsts_B, 1, ENDLESS], max(rows.lengths, default=0)


def _memory(rows: Rows) -> Tensor:
    return rows.rows if isinstance(rows, FlatRows) else rows.pool


def _has_heads(rows: Rows) -> bool:
    return _memory(rows).dim() == (3 if isinstance(rows, FlatRows) else 4)
