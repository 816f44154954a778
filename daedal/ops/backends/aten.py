"""Backend `aten`: the same ops on PyTorch's own fused kernels, on any device that has them.

What it leans on: scaled-dot-product attention that never writes the score matrix, grouped matrix multiplication that
reads each expert once, fused norms, complex multiplication for rotation. It holds no kernel of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.backends.short_attention import LONGEST, short_attention
from daedal.ops.backends.token_order import Order, combine, dispatch
from daedal.ops.backends.trained_norm import trained_norm
from daedal.ops.packed import Packed
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Rows

BACKEND = "aten"

# Up to so many rows in all, a padded copy costs less than one call per sequence (docs/log.md, 2026-11-21).
SMALL_DECODE_ROWS = 2048


@REGISTRY.register("rms_norm", BACKEND)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    if torch.is_grad_enabled() and x_TD.requires_grad and weight_D is not None and x_TD.device.type == "cpu":
        return trained_norm(x_TD, weight_D, eps)
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
    index = 0
    while index < len(starts) - 1:
        start, end = starts[index], starts[index + 1]
        alike = _alike(index, starts, keys, values)
        if alike > (0 if torch.is_grad_enabled() else 1):
            assert isinstance(keys, FlatRows)
            assert isinstance(values, FlatRows | int)
            outputs.append(_whole_sequences(q_THK, starts[index : index + alike + 1], keys, values, scale))
            index += alike
            continue
        k_SGK = _heads(keys.sequence(index))
        if isinstance(values, int):
            # The whole row serves as its own value: what lies beyond the value part is cut off afterwards, which costs
            # less than a copy of the latents.
            v_SGV, value_dim = k_SGK, values
        else:
            v_SGV = _heads(values.sequence(index))
            value_dim = v_SGV.shape[-1]
        outputs.append(_one_sequence(q_THK[start:end], k_SGK, v_SGV, scale)[..., :value_dim])
        index += 1
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


def _alike(first: int, starts: tuple[int, ...], keys: Rows, values: Rows | int) -> int:
    """How many sequences from `first` on are whole and equally long, as in training; 0 where rows lie on pages."""
    if not isinstance(keys, FlatRows) or not isinstance(values, FlatRows | int):
        return 0
    length = starts[first + 1] - starts[first]
    count = 0
    if not length:
        return 0
    for index in range(first, len(starts) - 1):
        if {starts[index + 1] - starts[index], keys.starts[index + 1] - keys.starts[index]} != {length}:
            break
        count += 1
    return count


def _whole_sequences(
    q_THK: Tensor, starts: tuple[int, ...], keys: FlatRows, values: FlatRows | int, scale: float
) -> Tensor:
    """[t, H, V]: one fused call for sequences of one length; keys lie where queries do."""
    span, shape = slice(starts[0], starts[-1]), (len(starts) - 1, -1)
    k_SGK = _heads(keys.rows[span])
    v_SGV = k_SGK if isinstance(values, int) else _heads(values.rows[span])
    value_dim = values if isinstance(values, int) else v_SGV.shape[-1]
    if _writes_scores(q_THK, k_SGK, starts[1] - starts[0]):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2).flatten(0, 1) for x in (q_THK[span], k_SGK, v_SGV))
        o_BHtV: Tensor = short_attention(q, k, v, scale=scale).unflatten(0, shape)
        return o_BHtV.transpose(1, 2).flatten(0, 1)[..., :value_dim]
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in _same_width(q_THK[span], k_SGK, v_SGV))
    o_BHtV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o_BHtV.transpose(1, 2).flatten(0, 1)[..., :value_dim]


def _writes_scores(q_THK: Tensor, k_SGK: Tensor, length: int) -> bool:
    """Whether `short_attention` is faster: in training, for bfloat16 on a CPU."""
    return (
        torch.is_grad_enabled()
        and q_THK.requires_grad
        and q_THK.device.type == "cpu"
        and q_THK.dtype == torch.bfloat16
        and q_THK.shape[1] == k_SGK.shape[1]
        and length <= LONGEST
    )


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
    if silicon.of(x_TD.device).device == "cuda" and x_TD.dtype != torch.bfloat16:
        return "grouped matrix multiplication on CUDA takes bfloat16 only"
    if any(size * x_TD.element_size() % 16 for size in (down_EDF.shape[1], down_EDF.shape[2])):
        return "grouped matrix multiplication needs rows of a multiple of 16 bytes"
    return "no tokens" if x_TD.shape[0] == 0 else None


@REGISTRY.register("experts", BACKEND, supports=_experts_supports)
def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, *, limit: float | None
) -> Tensor:
    num_rows, num_experts = ids_TA.numel(), gate_up_EFD.shape[0]
    ids_TA, choice_TA = ids_TA.sort(dim=-1, stable=True)  # a token's sum goes by the experts' numbers
    weights_TA = weights_TA.gather(-1, choice_TA)
    on_cpu = x_TD.device.type == "cpu"
    order = Order.of(ids_TA, num_experts, fills=on_cpu and torch.is_grad_enabled())
    rows_PD = dispatch(x_TD, order)
    if on_cpu and num_rows < num_experts:
        counts_E = order.ends_E.diff(prepend=order.ends_E.new_zeros(1))
        result_PD = _few_experts(rows_PD, counts_E.tolist(), gate_up_EFD, down_EDF, limit)
    else:
        gate, up = F.grouped_mm(rows_PD, gate_up_EFD.transpose(1, 2), offs=order.ends_E).chunk(2, -1)
        hidden_PF = REGISTRY.call("swiglu", gate, up, limit=limit)
        result_PD = F.grouped_mm(hidden_PF, down_EDF.transpose(1, 2), offs=order.ends_E)
    return combine(result_PD, weights_TA, order)


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
