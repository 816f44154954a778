"""Backend `aten`, the sparse side: entries are chosen in tiles, and attention reads only what was chosen.

Queries go in blocks small enough that a block's scores and gathered rows stay within a few megabytes, whatever the
context. All heads share one row per key, so a block is a handful of matrix products.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.backends.aten import BACKEND
from daedal.ops.reference import wide
from daedal.ops.reference_sparse import chosen_width, visible
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import Rows

BLOCK = 128  # queries at once, at most
TILE_NUMBERS = 2**22  # numbers of a temporary tensor of attention, about: 16 MiB in float32
SCORE_NUMBERS = 2**22  # scores held at once
PRODUCT_NUMBERS = 2**18  # per-head scores held at once: they should stay in a core's own cache
SET = 16  # scores that are judged together first
GATHER_HEADS = 16  # copying a row costs about as much as so many heads' arithmetic on it


@REGISTRY.register("choose_entries", BACKEND)
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
    chosen_TA = q_TIK.new_full((q_TIK.shape[0], chosen_width(keys, count)), -1, dtype=torch.int64)
    with torch.no_grad():
        for index, (start, end) in enumerate(pairwise(starts)):
            if end == start:
                continue
            seen_t = visible(pasts[index], end - start, rate, q_TIK.device)
            most = (pasts[index] + end - start) // rate
            if most <= count:
                all_A = torch.arange(chosen_TA.shape[1], device=q_TIK.device)
                chosen_TA[start:end] = torch.where(all_A < seen_t[:, None], all_A, -1)
                continue
            keys_SK = keys.sequence(index)
            block = max(min(BLOCK, SCORE_NUMBERS // most), 1)
            for first in range(0, end - start, block):
                rows = slice(start + first, min(start + first + block, end))
                num_seen, num_keys = ((pasts[index] + last) // rate for last in (first + 1, rows.stop - start))
                if num_keys == 0:
                    continue
                scores_tS = _scores(wide(q_TIK[rows]), wide(weights_TI[rows]), keys_SK[:num_keys])
                chosen_TA[rows] = _best(scores_tS, seen_t[first : first + block], num_seen, count, chosen_TA.shape[1])
    return chosen_TA


def _scores(q_tIK: Tensor, weights_tI: Tensor, keys_SK: Tensor) -> Tensor:
    """[t, S], in tiles of keys."""
    num_queries, heads = weights_tI.shape
    scores_tS = q_tIK.new_empty(num_queries, keys_SK.shape[0])
    tile = max(PRODUCT_NUMBERS // (num_queries * heads), 64)
    flat_q, weights_t1I = q_tIK.flatten(0, 1), weights_tI.unsqueeze(1)
    for first in range(0, keys_SK.shape[0], tile):
        products = (flat_q @ wide(keys_SK[first : first + tile]).T).relu_().view(num_queries, heads, -1)
        scores_tS[:, first : first + tile] = torch.bmm(weights_t1I, products).squeeze(1)
    return scores_tS


def _best(scores_tS: Tensor, seen_t: Tensor, least_seen: int, count: int, width: int) -> Tensor:
    """[t, width]: the `count` best of each row's first `seen` entries, at least `least_seen`, ascending, ties to the
    lowest, then -1.
    """
    num_scores = scores_tS.shape[1]
    if least_seen < num_scores:
        hidden_tE = torch.arange(least_seen, num_scores, device=scores_tS.device) >= seen_t[:, None]
        scores_tS[:, least_seen:].masked_fill_(hidden_tE, float("-inf"))
    num_best = min(count, num_scores)
    if num_scores > 2 * SET * num_best:
        columns_tC, tied_t = _candidates(scores_tS, num_best)
        taken_tA = columns_tC.gather(1, _top(scores_tS.gather(1, columns_tC), num_best))
        if bool(tied_t.any()):
            taken_tA[tied_t] = _top(scores_tS[tied_t], num_best)
    else:
        taken_tA = _top(scores_tS, num_best)
    chosen = torch.where(taken_tA < seen_t[:, None], taken_tA, -1)
    return torch.nn.functional.pad(chosen, (0, width - num_best), value=-1)


def _candidates(scores_tS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """columns_tC, ascending: few columns that hold each row's `count` best; tied_t: rows where ties leave that open.

    The best `count` lie in the `count` sets of columns whose maxima are highest: one pass over the scores finds these,
    instead of the several that sorting takes. A set takes every R-th column, so that the pass goes along memory.
    """
    num_sets = scores_tS.shape[1] // SET
    maxima_tR = scores_tS[:, : num_sets * SET].unflatten(1, (SET, num_sets)).amax(1)
    values_tA, sets_tA = maxima_tR.topk(count, sorted=False)
    least_t1 = values_tA.amin(1, keepdim=True)
    tied_t = (maxima_tR >= least_t1).sum(1) > count
    offsets_E1 = torch.arange(SET, device=scores_tS.device).unsqueeze(1) * num_sets
    columns_tC = (offsets_E1 + sets_tA.sort(1).values.unsqueeze(1)).flatten(1)
    rest = torch.arange(num_sets * SET, scores_tS.shape[1], device=scores_tS.device)
    return torch.cat((columns_tC, rest.expand(scores_tS.shape[0], -1)), 1), tied_t


def _top(scores_tC: Tensor, count: int) -> Tensor:
    """[t, count], ascending: the columns of the highest scores, ties to the lowest."""
    least_t1 = scores_tC.topk(count, sorted=False).values.amin(1, keepdim=True)
    above_tC = scores_tC > least_t1
    # topk promises nothing about which of equals it takes: the lowest fill what is left.
    equal_tC = scores_tC == least_t1
    room_t1 = count - above_tC.sum(1, keepdim=True)
    taken_tC = above_tC | (equal_tC & (equal_tC.cumsum(1) <= room_t1))
    columns_N = taken_tC.nonzero()[:, 1]
    if columns_N.shape[0] < scores_tC.shape[0] * count:
        # NaN, which equals nothing: it counts as the highest, so that the model's logits show it.
        return _top(scores_tC.nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf), count)
    return columns_N.view(-1, count)


@REGISTRY.register("sparse_attention", BACKEND)
def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> Tensor:
    outputs = [q_THK.new_empty(0, q_THK.shape[1], value_dim)]
    for index, (start, end) in enumerate(pairwise(starts)):
        past, num_new = pasts[index], end - start
        chosen_tA = None if chosen_TA is None else chosen_TA[start:end]
        keys = _Keys(q_THK[start:end], index, past, entries, chosen_tA, window)
        block = keys.block(rate)
        # A block of no queries too: gradients of what it would have read are then zero, and not absent.
        for first in range(0, max(num_new, 1), block):
            last = min(first + block, num_new)
            q_tHK = wide(q_THK[start + first : start + last]) * scale
            parts = keys.parts(first, last, rate, span)
            outputs.append(_attend(q_tHK, parts, sinks_H, value_dim).to(q_THK.dtype))
    return torch.cat(outputs)


Part = tuple[Tensor, Tensor]  # rows [n, K] for all queries of a block or [t, n, K] for each; which they see, [t, n]


class _Keys:
    """What the queries of one sequence may read, cut to size for one block of them at a time."""

    def __init__(
        self,
        q_tHK: Tensor,
        index: int,
        past: int,
        entries: Rows | None,
        chosen_tA: Tensor | None,
        window: Rows | None,
    ):
        num_new, self._heads, self._dim = q_tHK.shape
        self._index, self._past, self._last, self._device = index, past, past + num_new, q_tHK.device
        self._entries, self._chosen_tA = entries, chosen_tA
        self._window_WK = None if window is None else window.sequence(index)
        num_entries = 0 if entries is None else entries.lengths[index]
        num_chosen = num_entries if chosen_tA is None else chosen_tA.shape[1]
        self._gathers = 0 < num_chosen * (1 + GATHER_HEADS / self._heads) < num_entries
        self._all_SK = None if entries is None or self._gathers else wide(entries.sequence(index))

    def block(self, rate: int) -> int:
        """Queries that go together."""
        if self._gathers:
            assert self._chosen_tA is not None
            return max(min(BLOCK, TILE_NUMBERS // (self._chosen_tA.shape[1] * max(self._dim, self._heads))), 1)
        return max(min(BLOCK, TILE_NUMBERS // (self._heads * (BLOCK + self._last // rate))), 1)

    def parts(self, first: int, last: int, rate: int, span: int) -> list[Part]:
        """For queries first to last of the sequence's own: window rows, then entries."""
        positions_t = torch.arange(self._past + first, self._past + last, device=self._device)
        parts: list[Part] = []
        if self._window_WK is not None:
            origin = self._last - self._window_WK.shape[0]
            low, high = max(self._past + first - span + 1, origin), self._past + last
            age_tW = positions_t[:, None] - torch.arange(low, high, device=self._device)
            parts.append((wide(self._window_WK[low - origin : high - origin]), (age_tW >= 0) & (age_tW < span)))
        if self._entries is None or (self._past + last) // rate == 0:
            return parts
        seen_t1 = ((positions_t + 1) // rate)[:, None]
        if self._chosen_tA is None:
            rows_SK = self._rows(last, rate)
            parts.append((rows_SK, torch.arange(rows_SK.shape[0], device=self._device) < seen_t1))
            return parts
        chosen_tA = self._chosen_tA[first:last]
        named_tA = (chosen_tA >= 0) & (chosen_tA < seen_t1)
        if self._gathers:
            parts.append((wide(self._entries.take(self._index, torch.where(named_tA, chosen_tA, 0))), named_tA))
            return parts
        rows_SK = self._rows(last, rate)
        num_rows = rows_SK.shape[0]
        seen_tS = torch.zeros(last - first, num_rows + 1, dtype=torch.bool, device=self._device)
        seen_tS.scatter_(1, torch.where(named_tA, chosen_tA, num_rows), True)
        parts.append((rows_SK, seen_tS[:, :-1]))
        return parts

    def _rows(self, last: int, rate: int) -> Tensor:
        """Entries that query last - 1 sees."""
        assert self._all_SK is not None
        return self._all_SK[: (self._past + last) // rate]


def _attend(q_tHK: Tensor, parts: list[Part], sinks_H: Tensor | None, value_dim: int) -> Tensor:
    """[t, H, V] in float32; q_tHK is scaled already. One softmax over all parts and the sink."""
    logits: list[Tensor] = []
    for rows, seen_tn in parts:
        product_tHn = torch.matmul(q_tHK, rows.transpose(-2, -1) if rows.dim() == 3 else rows.T)
        logits.append(product_tHn.masked_fill(~seen_tn[:, None], float("-inf")))
    if sinks_H is not None:
        logits.append(sinks_H.to(q_tHK.dtype)[None, :, None].expand(q_tHK.shape[0], -1, 1))
    if not logits:
        return q_tHK.new_zeros(*q_tHK.shape[:2], value_dim)
    together = torch.cat(logits, -1)
    peak_tH1 = together.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(together.dtype).min)
    weights = (together - peak_tH1).exp()
    total_tH1 = weights.sum(-1, keepdim=True)
    o_tHV = q_tHK.new_zeros(*q_tHK.shape[:2], value_dim)
    start = 0
    for rows, seen_tn in parts:
        weights_tHn = weights[..., start : start + seen_tn.shape[1]]
        o_tHV = o_tHV + torch.matmul(weights_tHn, rows[..., :value_dim])
        start += seen_tn.shape[1]
    return o_tHV / total_tH1.clamp_min(torch.finfo(total_tH1.dtype).tiny)


def _collapse_supports(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> str | None:
    return "it divides in place, and gradients are on" if torch.is_grad_enabled() else None


@REGISTRY.register("hyper_collapse", BACKEND, supports=_collapse_supports)
def hyper_collapse(
    streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_streams = streams_TMD.shape[:2]
    streams = wide(streams_TMD)
    flat = streams.flatten(1)
    mixes = (flat @ fn.to(flat.dtype).T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    parts = (num_streams, num_streams, num_streams**2)
    scales = torch.cat([one.expand(count) for one, count in zip(scale, parts, strict=True)])
    logits = torch.addcmul(base, mixes, scales)
    gates = logits[:, : 2 * num_streams].sigmoid()
    pre_TM, post_TM = gates[:, :num_streams] + eps, 2 * gates[:, num_streams:]
    # The matrix with eps as one more row and column: its sums along either axis are then those that divide it.
    framed = flat.new_full((num_tokens, num_streams + 1, num_streams + 1), eps)
    comb_TMM = framed[:, :-1, :-1]
    comb_TMM.copy_(logits[:, 2 * num_streams :].unflatten(-1, (num_streams, num_streams)).softmax(-1)).add_(eps)
    columns, rows = framed[:, :, :-1], framed[:, :-1]
    comb_TMM.div_(columns.sum(1, keepdim=True))
    for _ in range(iterations - 1):
        comb_TMM.div_(rows.sum(2, keepdim=True))
        comb_TMM.div_(columns.sum(1, keepdim=True))
    x_TD = torch.bmm(pre_TM.unsqueeze(1), streams).squeeze(1)
    return x_TD.to(streams_TMD.dtype), post_TM, comb_TMM.contiguous()


@REGISTRY.register("hyper_head", BACKEND)
def hyper_head(streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    streams = wide(streams_TMD)
    flat = streams.flatten(1)
    mixes_TM = (flat @ fn.to(flat.dtype).T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    weights_TM = torch.addcmul(base, mixes_TM, scale).sigmoid() + eps
    return torch.bmm(weights_TM.unsqueeze(1), streams).squeeze(1).to(streams_TMD.dtype)


@REGISTRY.register("hyper_expand", BACKEND)
def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    outer_TMD = post_TM.unsqueeze(-1) * wide(y_TD).unsqueeze(1)
    return torch.baddbmm(outer_TMD, comb_TMM.transpose(1, 2), wide(streams_TMD)).to(streams_TMD.dtype)
