"""The reference of the sparse side: choosing entries, attention over a window and entries, hyper-connections.

Written to be read: masks say who sees what, and nothing is skipped.
"""

from itertools import pairwise

import torch
from torch import Tensor

from daedal.ops.reference import wide
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import Rows


@REGISTRY.register("choose_entries", REFERENCE)
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
            keys_SK = wide(keys.sequence(index))
            products_tIS = torch.einsum("tik,sk->tis", wide(q_TIK[start:end]), keys_SK).relu()
            scores_tS = torch.einsum("tis,ti->ts", products_tIS, wide(weights_TI[start:end]))
            visible_t = visible(pasts[index], end - start, rate, q_TIK.device)
            hidden_tS = torch.arange(keys_SK.shape[0], device=q_TIK.device) >= visible_t[:, None]
            ranked_tS = (
                scores_tS.masked_fill(hidden_tS, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
            )
            for row, (order_S, seen) in enumerate(zip(ranked_tS, visible_t.tolist(), strict=True)):
                best = order_S[: min(count, seen)].sort().values
                chosen_TA[start + row, : best.shape[0]] = best
    return chosen_TA


def chosen_width(keys: Rows, count: int) -> int:
    """Columns of `choose_entries`' result."""
    return min(count, max(keys.lengths, default=0))


def visible(past: int, num_new: int, rate: int, device: torch.device) -> Tensor:
    """Per query of a sequence, how many entries it sees: those whose last token is not after it."""
    return (torch.arange(past, past + num_new, device=device) + 1) // rate


@REGISTRY.register("sparse_attention", REFERENCE)
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
        q_tHK = wide(q_THK[start:end])
        positions_t = torch.arange(pasts[index], pasts[index] + end - start, device=q_THK.device)
        rows, seen = [q_tHK.new_empty(0, q_THK.shape[-1])], [positions_t.new_empty(end - start, 0, dtype=torch.bool)]
        if window is not None:
            rows.append(wide(window.sequence(index)))
            last = pasts[index] + end - start
            age_tW = positions_t[:, None] - torch.arange(last - rows[-1].shape[0], last, device=q_THK.device)
            seen.append((age_tW >= 0) & (age_tW < span))
        if entries is not None:
            rows.append(wide(entries.sequence(index)))
            numbers_S = torch.arange(rows[-1].shape[0], device=q_THK.device)
            seen_tS = numbers_S < visible(pasts[index], end - start, rate, q_THK.device)[:, None]
            if chosen_TA is not None:
                seen_tS = seen_tS & (chosen_TA[start:end, :, None] == numbers_S).any(1)
            seen.append(seen_tS)
        outputs.append(_attend(q_tHK, torch.cat(rows), torch.cat(seen, 1), sinks_H, value_dim, scale).to(q_THK.dtype))
    return torch.cat(outputs)


def _attend(
    q_tHK: Tensor, rows_NK: Tensor, seen_tN: Tensor, sinks_H: Tensor | None, value_dim: int, scale: float
) -> Tensor:
    logits_tHN = torch.einsum("thk,nk->thn", q_tHK, rows_NK) * scale
    logits_tHN = logits_tHN.masked_fill(~seen_tN[:, None], float("-inf"))
    if sinks_H is not None:
        sinks_tH1 = wide(sinks_H)[None, :, None].expand(q_tHK.shape[0], -1, 1)
        logits_tHN = torch.cat((logits_tHN, sinks_tH1.to(logits_tHN.dtype)), -1)
    elif not bool(seen_tN.any(1).all()):
        logits_tHN = torch.where(seen_tN.any(1)[:, None, None], logits_tHN, 0.0)
    weights_tHN = logits_tHN.softmax(-1)[..., : rows_NK.shape[0]] * seen_tN[:, None]
    return torch.einsum("thn,nv->thv", weights_tHN, rows_NK[:, :value_dim])


@REGISTRY.register("hyper_collapse", REFERENCE)
def hyper_collapse(
    streams_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_streams = streams_TMD.shape[1]
    streams = wide(streams_TMD)
    flat = streams.flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    mixes = normed @ wide(fn).to(flat.dtype).T
    into, out, between = mixes.split((num_streams, num_streams, num_streams**2), -1)
    into_base, out_base, between_base = base.split((num_streams, num_streams, num_streams**2))
    pre_TM = torch.sigmoid(into * scale[0] + into_base) + eps
    post_TM = 2 * torch.sigmoid(out * scale[1] + out_base)
    logits_TMM = (between * scale[2] + between_base).unflatten(-1, (num_streams, num_streams))
    comb_TMM = logits_TMM.softmax(-1) + eps
    comb_TMM = comb_TMM / (comb_TMM.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb_TMM = comb_TMM / (comb_TMM.sum(-1, keepdim=True) + eps)
        comb_TMM = comb_TMM / (comb_TMM.sum(-2, keepdim=True) + eps)
    x_TD = (pre_TM.unsqueeze(-1) * streams).sum(1)
    return x_TD.to(streams_TMD.dtype), post_TM, comb_TMM


@REGISTRY.register("hyper_head", REFERENCE)
def hyper_head(streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    streams = wide(streams_TMD)
    flat = streams.flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    weights_TM = torch.sigmoid(normed @ wide(fn).to(flat.dtype).T * scale + base) + eps
    return (weights_TM.unsqueeze(-1) * streams).sum(1).to(streams_TMD.dtype)


@REGISTRY.register("hyper_expand", REFERENCE)
def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    mixed_TMD = torch.einsum("tjk,tjd->tkd", comb_TMM, wide(streams_TMD))
    return (post_TM.unsqueeze(-1) * wide(y_TD).unsqueeze(1) + mixed_TMD).to(streams_TMD.dtype)
