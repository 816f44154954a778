"""Backend `aten`: the same ops on PyTorch's own fused kernels, on any device that has them.

What it leans on: scaled-dot-product attention that never writes the score matrix, grouped matrix multiplication that
reads each expert once, fused norms, complex multiplication for rotation. It holds no kernel of its own.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from daedal.ops.packed import Packed
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Rows

BACKEND = "aten"

# Up to so many rows in all, a padded copy costs less than one call per sequence (docs/log.md, 2026-11-21).
SMALL_DECODE_ROWS = 2048


@REGISTRY.register("rms_norm", BACKEND)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x_TD, x_TD.shape[-1:], None if weight_D is None else weight_D.to(x_TD.dtype), eps)


def _plain(weight: Tensor | Packed) -> str | None:
    return "does not read packed weights" if isinstance(weight, Packed) else None


def _linear_supports(x_TD: Tensor, weight_FD: Tensor | Packed, bias_F: Tensor | None) -> str | None:
    return _plain(weight_FD)


@REGISTRY.register("linear", BACKEND, supports=_linear_supports)
def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    if (
        x_TD.shape[0] == 1
        and x_TD.dtype == torch.bfloat16
        and x_TD.device.type == "cpu"
        and not torch.is_grad_enabled()
    ):
        # One row in bfloat16 is a matrix-vector product, for which torch's CPU build has a kernel of its own; the path
        # of F.linear reads weights a quarter slower.
        y_1F = torch.mv(weight_FD, x_TD[0]).unsqueeze(0)
        return y_1F if bias_F is None else y_1F + bias_F
    return F.linear(x_TD, weight_FD, bias_F)


def _grouped_linear_supports(x_TGC: Tensor, weight_GFC: Tensor | Packed) -> str | None:
    return _plain(weight_GFC)


@REGISTRY.register("grouped_linear", BACKEND, supports=_grouped_linear_supports)
def grouped_linear(x_TGC: Tensor, weight_GFC: Tensor) -> Tensor:
    if weight_GFC.stride(-1) == 1 and x_TGC.shape[0] == 1:
        # Weights on the left: on the right they would be copied first, where they are a slice of a larger matrix.
        return torch.matmul(weight_GFC, x_TGC.permute(1, 2, 0)).permute(2, 0, 1)
    return torch.bmm(x_TGC.transpose(0, 1), weight_GFC.transpose(1, 2)).transpose(0, 1)


@REGISTRY.register("rotary", BACKEND)
def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    wide = x_THR if x_THR.dtype == torch.float64 else x_THR.float()
    if interleaved:
        turn_T1C = torch.complex(cos_TC, sin_TC).to(wide.dtype.to_complex()).unsqueeze(1)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn_T1C).flatten(-2).to(x_THR.dtype)
    cos, sin = cos_TC.unsqueeze(1), sin_TC.unsqueeze(1)
    first, second = wide.chunk(2, -1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(rotated, -1).to(x_THR.dtype)


@REGISTRY.register("swiglu", BACKEND)
def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    if limit is not None:
        gate_TF, up_TF = gate_TF.clamp(max=limit), up_TF.clamp(-limit, limit)
    return F.silu(gate_TF) * up_TF


def _attention_supports(
    q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float
) -> str | None:
    return "no sequence in the batch" if len(starts) < 2 else None


@REGISTRY.register("attention", BACKEND, supports=_attention_supports)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    if isinstance(keys, PagedRows) and not isinstance(values, FlatRows) and _is_small_decode(starts, keys):
        return _one_token_each(q_THK, keys, values, scale)
    outputs = []
    for index, (start, end) in enumerate(pairwise(starts)):
        k_SGK = _heads(keys.sequence(index))
        if isinstance(values, int):
            # The whole row serves as its own value: what lies beyond the value part is cut off afterwards, which costs
            # less than a copy of the latents.
            v_SGV, value_dim = k_SGK, values
        else:
            v_SGV = _heads(values.sequence(index))
            value_dim = v_SGV.shape[-1]
        outputs.append(_one_sequence(q_THK[start:end], k_SGK, v_SGV, scale)[..., :value_dim])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _is_small_decode(starts: tuple[int, ...], keys: PagedRows) -> bool:
    """Whether several sequences bring one query each and are short enough to be copied side by side."""
    num_sequences = len(keys)
    one_each = num_sequences > 1 and starts == tuple(range(num_sequences + 1))
    return one_each and num_sequences * max(keys.lengths) <= SMALL_DECODE_ROWS


def _one_token_each(q_BHK: Tensor, keys: PagedRows, values: PagedRows | int, scale: float) -> Tensor:
    """[B, H, V]: one fused call for a whole batch of decoding sequences."""
    k_BSGK, hidden_BS = keys.padded()
    k_BSGK = k_BSGK if k_BSGK.dim() == 4 else k_BSGK.unsqueeze(2)
    v_BSGV = k_BSGK if isinstance(values, int) else values.padded()[0]
    value_dim = values if isinstance(values, int) else v_BSGV.shape[-1]
    q_BHK, k_BSGK, v_BSGV = _same_width(q_BHK, k_BSGK, v_BSGV)
    q_BGRK = q_BHK.unflatten(1, (k_BSGK.shape[2], -1))
    mask_BS = torch.zeros_like(hidden_BS, dtype=q_BHK.dtype).masked_fill_(hidden_BS, float("-inf"))
    o_BGRV = F.scaled_dot_product_attention(
        q_BGRK, k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=mask_BS[:, None, None], scale=scale
    )
    return o_BGRV.flatten(1, 2)[..., :value_dim]


def _one_sequence(q_tHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, scale: float) -> Tensor:
    """[t, H, >= V]: columns beyond the value's own hold nothing of meaning."""
    num_new, num_keys = q_tHK.shape[0], k_SGK.shape[0]
    k_GSK, v_GSV = k_SGK.transpose(0, 1), v_SGV.transpose(0, 1)
    # The fused kernel wants one width for queries, keys and values; without it torch falls back to writing out all
    # scores, which is ten times slower than a padded copy.
    q_tHK, k_GSK, v_GSV = _same_width(q_tHK, k_GSK, v_GSV)
    if num_new == 1:
        # One query per head sees every key: the heads of a group become queries of their key head, and no mask is left.
        q_GRK = q_tHK.view(k_GSK.shape[0], -1, q_tHK.shape[-1])
        return _sdpa(q_GRK, k_GSK, v_GSV, scale).reshape(1, q_tHK.shape[1], -1)
    q_HtK = q_tHK.transpose(0, 1)
    if num_new == num_keys:
        return _sdpa(q_HtK, k_GSK, v_GSV, scale, is_causal=True).transpose(0, 1)
    mask_tS = torch.full((num_new, num_keys), float("-inf"), dtype=q_tHK.dtype, device=q_tHK.device)
    mask_tS.triu_(num_keys - num_new + 1)
    return _sdpa(q_HtK, k_GSK, v_GSV, scale, mask=mask_tS).transpose(0, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    grouped = q.shape[0] != k.shape[0]
    return F.scaled_dot_product_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=grouped,
    ).squeeze(0)


def _same_width(*tensors: Tensor) -> list[Tensor]:
    width = max(tensor.shape[-1] for tensor in tensors)
    return [tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]


def _heads(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 3 else rows.unsqueeze(1)


def _experts_supports(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    *,
    limit: float | None,
) -> str | None:
    if isinstance(gate_up_EFD, Packed) or isinstance(down_EDF, Packed):
        return "does not read packed weights"
    if x_TD.dtype not in (torch.bfloat16, torch.float32):
        return f"grouped matrix multiplication does not take {x_TD.dtype}"
    if x_TD.device.type == "cuda" and x_TD.dtype != torch.bfloat16:
        return "grouped matrix multiplication on CUDA takes bfloat16 only"
    if any(size * x_TD.element_size() % 16 for size in (down_EDF.shape[1], down_EDF.shape[2])):
        return "grouped matrix multiplication needs rows of a multiple of 16 bytes"
    return "no tokens" if x_TD.shape[0] == 0 else None


@REGISTRY.register("experts", BACKEND, supports=_experts_supports)
def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, *, limit: float | None
) -> Tensor:
    ids_N = ids_TA.flatten()
    order_N = ids_N.argsort(stable=True)
    counts_E = torch.bincount(ids_N, minlength=gate_up_EFD.shape[0])
    tokens_N = order_N // ids_TA.shape[1]
    rows_ND = x_TD[tokens_N]
    if x_TD.device.type == "cpu" and ids_N.shape[0] < gate_up_EFD.shape[0]:
        result_ND = _few_experts(rows_ND, counts_E.tolist(), gate_up_EFD, down_EDF, limit)
    else:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(rows_ND, gate_up_EFD.transpose(1, 2), offs=ends_E).chunk(2, -1)
        result_ND = F.grouped_mm(swiglu(gate, up, limit=limit), down_EDF.transpose(1, 2), offs=ends_E)
    weighted_ND = result_ND.float() * weights_TA.flatten()[order_N].unsqueeze(-1)
    total = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, tokens_N, weighted_ND)
    return total.to(x_TD.dtype)


def _few_experts(
    rows_ND: Tensor, counts: list[int], gate_up_EFD: Tensor, down_EDF: Tensor, limit: float | None
) -> Tensor:
    """Expert by expert, passing over those without tokens, which the grouped kernel visits one by one on a CPU: a third
    of its time when one token chooses 6 of 48.
    """
    results, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            gate, up = linear(rows_ND[start : start + count], gate_up_EFD[expert], None).chunk(2, -1)
            results.append(linear(swiglu(gate, up, limit=limit), down_EDF[expert], None))
            start += count
    return torch.cat(results)
