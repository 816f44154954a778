"""Backend `aten`, V4's compressors behind their projections, and rows kept in rings.

Which rows a batch needs follows from its sizes alone: indices are made once for all layers of a step, and a step that
completes no group pools nothing. Knows no layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.backends.aten import BACKEND, rms_norm, rotary
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import PagedRows, page_table, staying

Numbers = tuple[int, ...]


@REGISTRY.register("keep_in_ring", BACKEND)
def keep_in_ring(rows: Tensor, starts: Numbers, pasts: Numbers, ring: Tensor, states: Numbers) -> None:
    source_N, target_N = _kept(starts, pasts, states, ring.shape[1], ring.device)
    if source_N.shape[0] < rows.shape[0]:
        rows = rows[source_N]
    ring.flatten(0, 1).index_copy_(0, target_N, rows.to(ring.dtype))


@lru_cache(maxsize=8)
def _kept(starts: Numbers, pasts: Numbers, states: Numbers, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tokens are kept, and as which rows of all rings."""
    source: list[int] = []
    target: list[int] = []
    for token, position, state in staying(starts, pasts, states, size):
        source.append(token)
        target.append(state * size + position % size)
    return _indices(source).to(device), _indices(target).to(device)


@REGISTRY.register("pool_groups", BACKEND)
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
    rate, dim = bias_rW.shape[0], weight_K.shape[0]
    groups = _groups(starts, pasts, states, rate, 2 * rate if overlaps else rate, ring.shape[1], ring.device)
    row_T2W = torch.stack((kv_TW, gate_TW + bias_rW[groups.phases_T]), 1)
    if groups.tokens_N.shape[0]:
        row_S2W = torch.cat((ring.flatten(0, 1)[groups.old_M], row_T2W))
        kv_NrW, gate_NrW = row_S2W[groups.places_Nr].unbind(2)
        if overlaps:
            kv_before, gate_before = row_S2W[groups.before_Nr][..., :dim].unbind(2)
            gate_before = gate_before.masked_fill(groups.is_first_N[:, None, None], float("-inf"))
            kv_NrW = torch.cat((kv_before, kv_NrW[..., dim:]), 1)
            gate_NrW = torch.cat((gate_before, gate_NrW[..., dim:]), 1)
        pooled_NK = rms_norm((kv_NrW * gate_NrW.softmax(1)).sum(1), weight_K, eps)
        plain = dim - 2 * cos_TC.shape[1]
        turn = cos_TC[groups.tokens_N], sin_TC[groups.tokens_N]
        tail_NR = rotary(pooled_NK[:, None, plain:], *turn, interleaved=True).squeeze(1)
        entry_NK = torch.cat((pooled_NK[:, :plain], tail_NR), -1)
        entries.pool.flatten(0, 1).index_copy_(0, _entry_rows(groups, entries), entries.held(entry_NK))
    keep_in_ring(row_T2W, starts, pasts, ring, states)


def _entry_rows(groups: "_Groups", entries: PagedRows) -> Tensor:
    """Where each new entry goes among the rows of its pool."""
    size, table_BP = entries.pages.page_size, page_table(entries.pages, groups.numbers_N.device)
    page_N = table_BP[groups.sequences_N, groups.numbers_N // size].long()
    return page_N * size + groups.numbers_N % size


@dataclass(frozen=True, kw_only=True, eq=False)
class _Groups:
    """The groups that a batch completes, N of them.

    old_M: rows of all rings that are read. places_Nr: each group's tokens among these and, behind them, the batch's.
    before_Nr: those of the group before it; of a sequence's first group, its own. tokens_N: the token in the batch that
    completes it. sequences_N, numbers_N: its sequence, and its number in that. phases_T: each token's place in its own
    group.
    """

    old_M: Tensor
    places_Nr: Tensor
    before_Nr: Tensor
    is_first_N: Tensor
    tokens_N: Tensor
    sequences_N: Tensor
    numbers_N: Tensor
    phases_T: Tensor


@lru_cache(maxsize=8)
def _groups(
    starts: Numbers, pasts: Numbers, states: Numbers, rate: int, reach: int, size: int, device: torch.device
) -> _Groups:
    """reach: tokens that an entry is made of."""
    old: list[int] = []
    firsts: list[int] = []  # of each sequence, the place of position 0 among old rows
    groups: list[tuple[int, int]] = []  # sequence and number
    for index, ((start, end), past, state) in enumerate(zip(pairwise(starts), pasts, states, strict=True)):
        new = range(past // rate, (past + end - start) // rate)
        groups.extend((index, number) for number in new)
        needed = range(max((new.start + 1) * rate - reach, 0), past) if new else range(past, past)
        firsts.append(len(old) - needed.start)
        old.extend(state * size + position % size for position in needed)
    sequences_N, numbers_N = _indices(groups).view(-1, 2).unbind(1)
    past_N, start_N, old_N = (_indices(values)[sequences_N] for values in (pasts, starts[:-1], firsts))
    new_N = start_N - past_N

    def places(numbers_N: Tensor) -> Tensor:
        positions_Nr = numbers_N[:, None] * rate + torch.arange(rate)
        shift_Nr = torch.where(positions_Nr < past_N[:, None], old_N[:, None], (new_N + len(old))[:, None])
        return positions_Nr + shift_Nr

    positions = [
        torch.arange(past, past + end - start) for past, (start, end) in zip(pasts, pairwise(starts), strict=True)
    ]
    return _Groups(
        old_M=_indices(old).to(device),
        places_Nr=places(numbers_N).to(device),
        before_Nr=places((numbers_N - 1).clamp(min=0)).to(device),
        is_first_N=(numbers_N == 0).to(device),
        tokens_N=(numbers_N * rate + rate - 1 + new_N).to(device),
        sequences_N=sequences_N.to(device),
        numbers_N=numbers_N.to(device),
        phases_T=(torch.cat([*positions, _indices([])]) % rate).to(device),
    )


def _indices(values: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
