"""V4's compressors behind their projections: two kernels, one for the entries, one for what is kept of the batch.

Which groups a batch completes and which of its rows stay follows from its sizes alone, and is worked out once for all
layers of a step.
"""

from functools import lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor

from daedal.ops.backends.triton import supports
from daedal.ops.backends.triton.kernels import compress as kernels
from daedal.ops.backends.triton.launch import block_of, on_device, sent, stretches
from daedal.ops.backends.triton.located import page_table
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import PagedRows, staying

_COLUMNS = 1024

Numbers = tuple[int, ...]


@REGISTRY.register("pool_groups", BACKEND, supports=supports.pool_groups)
def pool_groups(
    kv_TW: Tensor,
    gate_TW: Tensor,
    bias_rW: Tensor,
    weight_K: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    starts: Numbers,
    pasts: Numbers,
    ring: Tensor,
    states: Numbers,
    entries: PagedRows,
    *,
    eps: float,
    overlaps: bool,
) -> None:
    device, (rate, width), dim = kv_TW.device, bias_rW.shape, weight_K.shape[0]
    starts, pasts, states = tuple(starts), tuple(pasts), tuple(states)
    rows = kv_TW.contiguous(), gate_TW.contiguous(), bias_rW.contiguous()
    groups = _groups(starts, pasts, rate, device)
    table, pool = page_table(entries.pages, device), entries.pool
    for part in stretches(groups.shape[0], 1, device):
        kernels.pool[(part.stop - part.start,)](
            *rows, weight_K.contiguous(), cos_TC.contiguous(), sin_TC.contiguous(), ring, pool, groups[part],
            on_device(starts, device), on_device(pasts, device), on_device(states, device), table, width, width,
            ring.stride(0), ring.stride(1), ring.stride(2), ring.shape[1], table.stride(0), pool.shape[1],
            pool.stride(0), pool.stride(1), cos_TC.shape[1], float(eps), RATE=rate,
            REACH=2 * rate if overlaps else rate, WIDTH=width, DIM=dim, BLOCK=block_of(dim // 2),
        )  # fmt: skip
    kept, runs = _kept(starts, pasts, states, rate, ring.shape[1], device), triton.cdiv(width, _COLUMNS)
    for part in stretches(kept.shape[0], runs, device):
        kernels.keep[(part.stop - part.start, runs)](
            *rows, ring, kept[part], width, width, ring.stride(0), ring.stride(1), ring.stride(2), WIDTH=width,
            BLOCK=_COLUMNS,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _groups(starts: Numbers, pasts: Numbers, rate: int, device: torch.device) -> Tensor:
    """[N, 2] int32: sequence and number of each group that the batch completes."""
    pairs = [
        (sequence, number)
        for sequence, ((start, end), past) in enumerate(zip(pairwise(starts), pasts, strict=True))
        for number in range(past // rate, (past + end - start) // rate)
    ]
    return sent(torch.tensor(pairs, dtype=torch.int32).view(-1, 2), device)


@lru_cache(maxsize=8)
def _kept(starts: Numbers, pasts: Numbers, states: Numbers, rate: int, size: int, device: torch.device) -> Tensor:
    """[N, 4] int32: of each token that stays its number, its place in its group, its ring and its row in that."""
    found = staying(starts, pasts, states, size)
    rows = [(token, position % rate, state, position % size) for token, position, state in found]
    return sent(torch.tensor(rows, dtype=torch.int32).view(-1, 4), device)
