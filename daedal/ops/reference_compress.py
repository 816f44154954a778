"""The reference of what V4's compressors do behind their projections, and of rows kept on pages and in rings.

All write into a cache's memory and give nothing back, so they have no gradients: training pools whole sequences
through the model's own modules.
"""

from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.reference import rms_norm, rotary
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import PagedRows


@REGISTRY.register("keep_on_pages", REFERENCE)
def keep_on_pages(rows: Tensor, places_T: Tensor, kept: PagedRows) -> None:
    kept.pool.flatten(0, 1).index_copy_(0, places_T, kept.held(rows))


@REGISTRY.register("keep_in_ring", REFERENCE)
def keep_in_ring(
    rows: Tensor, starts: tuple[int, ...], pasts: tuple[int, ...], ring: Tensor, states: tuple[int, ...]
) -> None:
    size = ring.shape[1]
    for (start, end), past, state in zip(pairwise(starts), pasts, states, strict=True):
        first = max(end - size, start)
        positions = torch.arange(past + first - start, past + end - start, device=ring.device)
        ring[state, positions % size] = rows[first:end].to(ring.dtype)


@REGISTRY.register("pool_groups", REFERENCE)
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
    rate, dim = bias_rW.shape[0], weight_K.shape[0]
    positions_T = torch.cat(
        [torch.arange(past, past + end - start) for (start, end), past in zip(pairwise(starts), pasts, strict=True)]
        or [torch.arange(0)]
    ).to(kv_TW.device)
    row_T2W = torch.stack((kv_TW, gate_TW + bias_rW[positions_T % rate]), 1)
    for index, ((start, end), past) in enumerate(zip(pairwise(starts), pasts, strict=True)):
        for token in range(start, end):
            position = past + token - start
            if (position + 1) % rate:
                continue
            first = position + 1 - rate
            own = _rows(row_T2W[start:end], past, ring[states[index]], first, rate)
            kv_rK, gate_rK = (own[..., dim:] if overlaps else own).unbind(1)
            if overlaps and first > 0:
                before = _rows(row_T2W[start:end], past, ring[states[index]], first - rate, rate)[..., :dim]
                kv_rK, gate_rK = torch.cat((before[:, 0], kv_rK)), torch.cat((before[:, 1], gate_rK))
            pooled_1K = rms_norm((kv_rK * gate_rK.softmax(0)).sum(0, keepdim=True), weight_K, eps)
            plain = dim - 2 * cos_TC.shape[1]
            cos_1C, sin_1C = cos_TC[token : token + 1], sin_TC[token : token + 1]
            tail = rotary(pooled_1K[:, None, plain:], cos_1C, sin_1C, interleaved=True)
            page, row = divmod(position // rate, entries.pages.page_size)
            entry_K = torch.cat((pooled_1K[0, :plain], tail[0, 0]))
            entries.pool[entries.pages.tables[index][page], row] = entries.held(entry_K)
    keep_in_ring(row_T2W, starts, pasts, ring, states)


def _rows(new_t2W: Tensor, past: int, ring_N2W: Tensor, first: int, count: int) -> Tensor:
    """Rows of `count` positions: those before the batch from the ring."""
    positions = range(first, first + count)
    return torch.stack([new_t2W[p - past] if p >= past else ring_N2W[p % ring_N2W.shape[0]] for p in positions])
