"""The reference: every op in plain PyTorch, written to be read. It is the truth that each backend is held to.

It gives exact gradients by autograd, runs on every device, and spends memory and time freely. No case is special, no
trick is used; where arithmetic has an order or a precision, it is the one that the declaration states.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from daedal.ops.packed import Packed
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, Rows


@REGISTRY.register("rms_norm", REFERENCE)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    x = wide(x_TD)
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (scaled if weight_D is None else scaled * weight_D).to(x_TD.dtype)


@REGISTRY.register("linear", REFERENCE)
def linear(x_TD: Tensor, weight_FD: Tensor | Packed, bias_F: Tensor | None) -> Tensor:
    x = wide(x_TD)
    y_TF = x @ dense(weight_FD, x).T
    return (y_TF if bias_F is None else y_TF + bias_F).to(x_TD.dtype)


@REGISTRY.register("grouped_linear", REFERENCE)
def grouped_linear(x_TGC: Tensor, weight_GFC: Tensor | Packed) -> Tensor:
    x = wide(x_TGC)
    return torch.einsum("tgc,gfc->tgf", x, dense(weight_GFC, x)).to(x_TGC.dtype)


@REGISTRY.register("rotary", REFERENCE)
def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    x = wide(x_THR)
    cos, sin = cos_TC.unsqueeze(1), sin_TC.unsqueeze(1)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated.to(x_THR.dtype)


@REGISTRY.register("angles", REFERENCE)
def angles(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles_TC = positions_T.to(frequencies_C.dtype).unsqueeze(-1) * frequencies_C
    return angles_TC.cos() * scale, angles_TC.sin() * scale


@REGISTRY.register("swiglu", REFERENCE)
def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    gate, up = wide(gate_TF), wide(up_TF)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(gate) * up).to(gate_TF.dtype)


@REGISTRY.register("attention", REFERENCE)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    outputs = []
    for index, (start, end) in enumerate(pairwise(starts)):
        q_tHK = wide(q_THK[start:end])
        k_SGK = _heads(wide(keys.sequence(index)))
        v_SGV = k_SGK[..., :values] if isinstance(values, int) else _heads(wide(values.sequence(index)))
        num_new, num_keys = q_tHK.shape[0], k_SGK.shape[0]
        repeats = q_tHK.shape[1] // k_SGK.shape[1]
        k_SHK, v_SHV = k_SGK.repeat_interleave(repeats, 1), v_SGV.repeat_interleave(repeats, 1)
        scores_HtS = torch.einsum("thk,shk->hts", q_tHK, k_SHK) * scale
        last_t = torch.arange(num_keys - num_new, num_keys, device=q_THK.device)
        hidden_tS = torch.arange(num_keys, device=q_THK.device) > last_t[:, None]
        weights_HtS = scores_HtS.masked_fill(hidden_tS, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shv->thv", weights_HtS, v_SHV).to(q_THK.dtype))
    return torch.cat(outputs) if outputs else q_THK.new_empty(0, q_THK.shape[1], _value_dim(keys, values))


@REGISTRY.register("route", REFERENCE)
def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring: str,
    method: str,
    num_active: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    given_TA: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores_TE = expert_scores(logits_TE, scoring)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if given_TA is None and method != "greedy" and topk_group < n_group:
        grouped = choice_TE.unflatten(-1, (n_group, -1))
        if method == "noaux_tc":
            rank, excluded = grouped.topk(2, -1).values.sum(-1), float("-inf")
        else:
            rank, excluded = grouped.amax(-1), 0.0
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, _best(rank, topk_group), True)
        choice_TE = grouped.masked_fill(~kept.unsqueeze(-1), excluded).flatten(-2)
    ids_TA = _best(choice_TE, num_active) if given_TA is None else given_TA
    weights_TA = scores_TE.gather(-1, ids_TA)
    if normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
    return ids_TA, weights_TA * scale


@REGISTRY.register("experts", REFERENCE)
def experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    *,
    limit: float | None,
) -> Tensor:
    total = torch.zeros_like(wide(x_TD))
    for expert in range(gate_up_EFD.shape[0]):
        tokens, place = (ids_TA == expert).nonzero(as_tuple=True)
        gate_up_FD, down_DF = dense(gate_up_EFD[expert], x_TD), dense(down_EDF[expert], x_TD)
        gate, up = (x_TD[tokens] @ gate_up_FD.T).chunk(2, -1)
        result = swiglu(gate, up, limit=limit) @ down_DF.T
        total = total.index_add(0, tokens, wide(result) * weights_TA[tokens, place].unsqueeze(-1))
    return total.to(x_TD.dtype)


def expert_scores(logits_TE: Tensor, scoring: str) -> Tensor:
    """s of `ops.route`, [T, E]."""
    if scoring == "softmax":
        return logits_TE.softmax(-1)
    if scoring == "sigmoid":
        return logits_TE.sigmoid()
    # A logit below about -104 gives 0, at which a square root has no gradient.
    return F.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()


def wide(x: Tensor) -> Tensor:
    """float32 at least; float64 stays, so that tests can check against it."""
    return x if x.dtype == torch.float64 else x.float()


def dense(weight: Tensor | Packed, like: Tensor) -> Tensor:
    """A weight as numbers, in `like`'s dtype."""
    return weight.dense(like.dtype) if isinstance(weight, Packed) else weight.to(like.dtype)


def _heads(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 3 else rows.unsqueeze(1)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last axis, largest first, ties by the lowest index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _value_dim(keys: Rows, values: Rows | int) -> int:
    if isinstance(values, int):
        return values
    return values.rows.shape[-1] if isinstance(values, FlatRows) else values.row_shape[-1]
