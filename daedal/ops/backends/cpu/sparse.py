"""Choosing entries, and attention over a window and entries, on native kernels.

What changes from step to step reaches them in int32 tensors: boundaries, pasts, page tables and lengths.
"""

from functools import lru_cache

import torch
from torch import Tensor

from daedal.ops.backends.cpu.packed_rows import numbers_dtype, packed_sizes, packing
from daedal.ops.backends.cpu.program import TYPES, Argument, call, recorder
from daedal.ops.backends.cpu.rows import BACKEND, declines
from daedal.ops.registry import REGISTRY
from daedal.ops.rings import Lasting, RingRows
from daedal.ops.rows import FlatRows, MovingPages, PagedRows, Rows, Unrecordable

CHUNK = 1024  # slots whose softmax is taken at once
ROUND = 2048  # slots of the queries that go through the phases together
SCORES = 2**18  # scores held at once, of several queries
MOST_HEADS, MOST_DIM = 128, 256  # of an indexer: what a kernel holds on its stack


def moving_numbers(values: tuple[int, ...], what: str) -> Tensor:
    """int32: numbers that differ from step to step. Raises Unrecordable in a recorded step where they do not last."""
    if isinstance(values, Lasting):
        return values.tensor
    if recorder() is not None:
        raise Unrecordable(f"{what} are read on the host")
    return whole_numbers(values)


@lru_cache(maxsize=256)
def whole_numbers(values: tuple[int, ...]) -> Tensor:
    """int32: what a kernel reads when it runs. One tensor for equal values; nobody writes it."""
    return torch.tensor(values, dtype=torch.int32)


def table(rows: Rows | RingRows | None) -> tuple[Argument, ...]:
    """Rows as kernels find them: memory, page table, its columns, rows of a page, strides in bytes of a page and of a
    row, lengths.
    """
    if rows is None:
        return (None, None, 0, 1, 0, 0, None)
    if isinstance(rows, FlatRows):
        stride = rows.rows.stride(0) * rows.rows.itemsize
        starts, lengths = whole_numbers(rows.starts), whole_numbers(rows.lengths)
        return (rows.rows, starts, 1, 2**31, stride, stride, lengths)
    size, (page, row) = rows.pool.itemsize, rows.pool.stride()[:2]
    if isinstance(rows, RingRows):
        return (rows.pool, moving_numbers(rows.states, "states"), 1, 2**31, page * size, row * size, None)
    pages = rows.pages
    return (
        rows.pool,
        pages.table_BP,
        pages.table_BP.shape[1],
        pages.page_size,
        page * size,
        row * size,
        pages.lengths_B,
    )


def capacity(rows: Rows | RingRows) -> int:
    """The most rows that a sequence can have before its tensors change shape."""
    if isinstance(rows, PagedRows):
        return rows.pages.table_BP.shape[1] * rows.pages.page_size
    if isinstance(rows, RingRows):
        return rows.pool.shape[1]
    return max(rows.lengths, default=0)


def storage(rows: Rows | RingRows) -> Tensor:
    return rows.rows if isinstance(rows, FlatRows) else rows.pool


def declines_rows(q_THK: Tensor, *kinds: Rows | RingRows | None) -> str | None:
    """Why kernels cannot take these queries and rows."""
    if q_THK.dtype not in (torch.bfloat16, torch.float32):
        return f"takes bfloat16 and float32, not {q_THK.dtype}"
    for rows in kinds:
        if rows is None:
            continue
        held, dtype = storage(rows), numbers_dtype(rows)
        if dtype != q_THK.dtype:
            return f"takes rows in the queries' {q_THK.dtype}, not {dtype}"
        if held.stride(-1) != 1:
            return "takes dense rows"
        if reason := declines(held):
            return reason
    return declines(q_THK)


def _attention_supports(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> str | None:
    if sinks_H is not None and sinks_H.dtype not in (torch.bfloat16, torch.float32):
        return f"takes sinks in bfloat16 and float32, not {sinks_H.dtype}"
    if value_dim > q_THK.shape[-1]:
        return "takes values that are the first numbers of their rows"
    return declines_rows(q_THK, entries, window) or declines(sinks_H)


@REGISTRY.register("sparse_attention", BACKEND, supports=_attention_supports)
def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> Tensor:
    if q_THK.stride(-1) != 1:
        q_THK = q_THK.contiguous()
    chosen_TA = None if chosen_TA is None else chosen_TA.contiguous()
    tokens, heads, dim = q_THK.shape
    out_THV = torch.empty((tokens, heads, value_dim), dtype=q_THK.dtype)
    slots = min(span, capacity(window)) if window is not None else 0
    if entries is not None:
        slots += capacity(entries) if chosen_TA is None else chosen_TA.shape[1]
    chunk = max(min(-(-slots // 32) * 32, CHUNK), 32)
    round_ = max(min(ROUND // chunk, tokens), 1)
    item, ring = q_THK.itemsize, window.pool.shape[1] if isinstance(window, RingRows) else 0
    call(
        "sparse_attention",
        *(q_THK, q_THK.stride(0) * item, q_THK.stride(1) * item, TYPES[q_THK.dtype]),
        *(whole_numbers(starts), moving_numbers(pasts, "pasts"), tokens, len(pasts), heads, dim, value_dim, span, rate),
        *(float(scale), sinks_H, 0 if sinks_H is None else TYPES[sinks_H.dtype], out_THV),
        *(chosen_TA, 0 if chosen_TA is None else chosen_TA.shape[1], chunk, round_, ring),
        *_scratch(q_THK, value_dim, chunk, round_, several=slots > chunk),
        *table(entries),
        *table(window),
        *packed_sizes(entries),
    )
    return out_THV


def _scratch(q_THK: Tensor, value_dim: int, chunk: int, round_: int, *, several: bool) -> list[Tensor]:
    """Queries, scores, weights, values, state and sums of a round; large enough for either arithmetic."""
    tiles, dim, values = -(-q_THK.shape[1] // 16), -(-q_THK.shape[2] // 32) * 32, -(-value_dim // 32) * 32
    shapes = (
        (round_, tiles, dim, 16),
        (round_, tiles, chunk, 16),
        (round_, tiles, chunk, 8),
        (round_, chunk + 2, dim),
        (round_, tiles, 3, 16),
        (round_ if several else 0, tiles * 16, values),
    )
    return [torch.empty(shape) for shape in shapes]


def _choice_supports(
    q_TIK: Tensor,
    weights_TI: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    keys: Rows,
    *,
    count: int,
    rate: int,
) -> str | None:
    if q_TIK.shape[1] > MOST_HEADS or q_TIK.shape[2] > MOST_DIM:
        return f"takes at most {MOST_HEADS} index heads of {MOST_DIM} numbers, not {list(q_TIK.shape[1:])}"
    if weights_TI.dtype != torch.float32:
        return f"takes weights in float32, not {weights_TI.dtype}"
    if packing(keys) is not None:
        return "takes plain keys"
    # No gradient passes through a choice, so one that is wanted elsewhere is no hindrance.
    return declines_rows(q_TIK.detach(), keys) or declines(weights_TI.detach())


@REGISTRY.register("choose_entries", BACKEND, supports=_choice_supports)
def choose_entries(
    q_TIK: Tensor,
    weights_TI: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    keys: Rows,
    *,
    count: int,
    rate: int,
) -> Tensor:
    """As declared; in a recorded step as wide as `count` and the pages allow, because lengths will grow."""
    q_TIK = q_TIK.detach() if q_TIK.stride(-1) == 1 else q_TIK.detach().contiguous()
    tokens, heads, dim = q_TIK.shape
    most = capacity(keys)
    moves = isinstance(keys, PagedRows) and isinstance(keys.pages, MovingPages)
    width = min(count, most if moves else max(keys.lengths, default=0))
    chosen_TA = torch.empty((tokens, width), dtype=torch.int64)
    if chosen_TA.numel() == 0:
        return chosen_TA
    most = -(-most // 16) * 16
    round_ = max(min(SCORES // most, tokens), 1)
    item, tiles = q_TIK.itemsize, -(-heads // 16)
    queries = torch.empty((round_, tiles, -(-dim // 32) * 32, 16))
    scores = [torch.empty(shape) for shape in ((round_, tiles, 16), (round_, most), (round_, most // 16))]
    candidates = [torch.empty((round_, most), dtype=torch.int32) for _ in range(2)]
    call(
        "choose_entries",
        *(q_TIK, q_TIK.stride(0) * item, q_TIK.stride(1) * item, TYPES[q_TIK.dtype], weights_TI.detach().contiguous()),
        *(
            whole_numbers(starts),
            moving_numbers(pasts, "pasts"),
            tokens,
            len(pasts),
            heads,
            dim,
            rate,
            count,
            chosen_TA,
            width,
        ),
        *(most, round_, queries, *scores, *candidates, *table(keys)),
    )
    return chosen_TA
