"""How an indexer learns: its scores are drawn towards the attention that it stands for (V3.2, section 2; V4, 2.3).

The target of a query is what attention gives to each entry, summed over heads and made to sum to one over the entries
that it reads. Attention is one softmax over window, entries and sink together: a head that looks at its window counts
for less. The indexer's own distribution is the softmax of its scores over the same entries, and the loss their
Kullback-Leibler divergence. Before the sparse stage attention reads everything, and so does the loss; then only what
was chosen. No gradient reaches the attention. Knows no layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from daedal.model.forward_pass import Attended, Indexed
from daedal.ops.reference import wide

BLOCK = 128  # queries at once


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexerLesson:
    """One layer's loss, summed over the queries that had an entry to look at.

    queries: those of them that had to choose, as they saw more entries than the sparse stage reads. recall, held: sums
    over these. recall: of the entries to which attention gives most, as many as are read, the share that is among the
    indexer's best as many. held: the share of attention that the indexer's best hold, compared with the most that so
    many could hold. Both say something of the indexer only where attention reads everything.
    """

    loss: Tensor
    recall: Tensor
    held: Tensor
    queries: int


def lesson(seen: Indexed, attended: Attended, *, count: int) -> IndexerLesson:
    """What one layer's indexer can learn from its attention. count: entries that the sparse stage reads."""
    # Sums over nothing: an indexer that no query had a use for has a gradient of zero, and not none.
    keys = seen.keys.sequence(0)[:0].sum() if len(seen.keys) else 0.0
    total = wide(seen.q_TIK[:0].sum() + seen.weights_TI[:0].sum() + keys)
    recall, held, queries = torch.zeros(()), torch.zeros(()), 0
    for block in _blocks(attended):
        seen_tS, scores_tS = _scores(seen, attended, block)
        with torch.no_grad():
            target_tS, mass_t = _target(attended, block, seen_tS)
            used_t = mass_t > 0
        if not bool(used_t.any()):
            continue
        guess_tS = scores_tS.masked_fill(~seen_tS, float("-inf")).log_softmax(-1)[used_t]
        target_tS = target_tS[used_t]
        # Where the target is 0 nothing is compared, though the guess may be minus infinity there.
        apart_tS = torch.where(target_tS > 0, target_tS * (target_tS.clamp_min(1e-30).log() - guess_tS), 0.0)
        total = total + apart_tS.sum()
        choosing_t = seen_tS[used_t].sum(-1) > count
        found, share = _compared(guess_tS.detach()[choosing_t], target_tS[choosing_t], count)
        recall, held, queries = recall + found.cpu(), held + share.cpu(), queries + int(choosing_t.sum())
    return IndexerLesson(loss=total, recall=recall, held=held, queries=queries)


@dataclass(frozen=True)
class _Block:
    """Queries `first` to `last` of the batch, all of one sequence, which has `past` tokens before the batch's."""

    sequence: int
    first: int
    last: int
    begin: int
    past: int

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.first, self.last, device=device) - self.begin + self.past


def _blocks(attended: Attended) -> Iterator[_Block]:
    batch = attended.batch
    for sequence, (begin, end) in enumerate(pairwise(batch.starts)):
        for first in range(begin, end, BLOCK):
            yield _Block(sequence, first, min(end, first + BLOCK), begin, batch.pasts[sequence])


def _scores(seen: Indexed, attended: Attended, block: _Block) -> tuple[Tensor, Tensor]:
    """(which entries each query reads, the indexer's scores of all), [t, S]."""
    keys_SK = wide(seen.keys.sequence(block.sequence))
    queries_tIK = wide(seen.q_TIK[block.first : block.last])
    products_tIS = torch.einsum("tik,sk->tis", queries_tIK, keys_SK).relu()
    scores_tS = torch.einsum("ti,tis->ts", wide(seen.weights_TI[block.first : block.last]), products_tIS)
    positions_t = block.positions(scores_tS.device)
    places_S = torch.arange(keys_SK.shape[0], device=scores_tS.device)
    seen_tS = places_S < ((positions_t + 1) // seen.rate)[:, None]
    if attended.chosen_TA is not None:
        chosen_tA = attended.chosen_TA[block.first : block.last]
        named_tS = torch.zeros(chosen_tA.shape[0], keys_SK.shape[0] + 1, dtype=torch.bool, device=scores_tS.device)
        named_tS.scatter_(1, torch.where(chosen_tA < 0, keys_SK.shape[0], chosen_tA), True)
        seen_tS = seen_tS & named_tS[:, :-1]
    return seen_tS, scores_tS


def _target(attended: Attended, block: _Block, seen_tS: Tensor) -> tuple[Tensor, Tensor]:
    """(attention over the entries, summed over heads and to 1 [t, S]; what they had before that [t])."""
    queries_tHK = wide(attended.q_THK[block.first : block.last])
    entries_SK = wide(attended.entries.sequence(block.sequence))
    logits_HtS = torch.einsum("thk,sk->hts", queries_tHK, entries_SK) * attended.scale
    logits_HtS = logits_HtS.masked_fill(~seen_tS, float("-inf"))
    others = [_window(attended, block, queries_tHK)] if attended.window is not None else []
    if attended.sinks_H is not None:
        others.append(wide(attended.sinks_H)[:, None, None].expand(-1, queries_tHK.shape[0], 1))
    total_Ht = torch.cat((logits_HtS, *others), -1).logsumexp(-1)
    shares_tS = (logits_HtS - total_Ht[..., None]).exp().nan_to_num(0.0).sum(0)
    mass_t = shares_tS.sum(-1)
    return shares_tS / mass_t.clamp_min(1e-30)[:, None], mass_t


def _window(attended: Attended, block: _Block, queries_tHK: Tensor) -> Tensor:
    """Logits of the window's rows, [H, t, W], those that a query does not see at minus infinity."""
    assert attended.window is not None
    rows_WK = wide(attended.window.sequence(block.sequence))
    batch = attended.batch
    end = batch.pasts[block.sequence] + batch.starts[block.sequence + 1] - block.begin
    places_W = torch.arange(end - rows_WK.shape[0], end, device=rows_WK.device)
    positions_t = block.positions(rows_WK.device)[:, None]
    seen_tW = (places_W <= positions_t) & (places_W > positions_t - attended.span)
    logits_HtW = torch.einsum("thk,wk->htw", queries_tHK, rows_WK) * attended.scale
    return logits_HtW.masked_fill(~seen_tW, float("-inf"))


def _compared(guess_tS: Tensor, target_tS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums over queries, `recall` and `held` of the lesson; each query sees more than `count` entries."""
    count = min(count, guess_tS.shape[1])
    best_tA, largest_tA = guess_tS.topk(count, -1).indices, target_tS.topk(count, -1)
    named_tS = torch.zeros_like(target_tS, dtype=torch.bool).scatter_(1, best_tA, True)
    found_t = named_tS.gather(1, largest_tA.indices).float().mean(-1)
    share_t = target_tS.gather(1, best_tA).sum(-1) / largest_tA.values.sum(-1).clamp_min(1e-30)
    return found_t.sum(), share_t.sum()
