"""The fused ops of Huawei's chips, each called in one place by the signature that torch_npu 2.13 declares.

Names and meanings of arguments: the manuals of Ascend/op-plugin. Numbers that mean a choice there have names here. What
an op asks of its arguments (contiguous, 16 bits, one key head) is kept by the callers. Knows no op of Daedal's.
`tools/npu_schemas.py` holds these calls to the declarations in the published package.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = (
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_swiglu_backward",
    "npu_clipped_swiglu",
    "npu_fused_infer_attention_score_v2",
    "npu_lightning_indexer",
    "npu_sparse_flash_attention",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_dynamic_quant",
    "npu_dynamic_mx_quant",
    "npu_quant_matmul",
)
"""Every op that is called below."""

_CAUSAL = 3  # sparse_mode: the last query sees every key, the one before it all but the last
_CHOSEN_ALONE = 0  # sparse_mode: no mask beside what is chosen
_ABSORBED = 2  # attention_mode: keys serve as values, their rotated part apart
_SINGLE = 2  # split_item: one tensor for all groups
_ROWS = 0  # group_type: groups of rows
_COUNTS = 1  # group_list_type, expert_tokens_num_type: how many rows each group has
_DYNAMIC_INT8, _UNQUANTISED = 1, -1  # quant_mode of routing
_GATHER = 0  # row_idx_type: of each token's choices, where the row lies
_SIGMOID, _SOFTMAX = 1, 0  # norm_type
_BEST_TWO, _BEST = 1, 0  # group_select_mode
_ROUNDED_UP = 1  # scale_alg: scales so large that no code overflows
_E4M3, _E8M0 = 292, 293  # types as torch_npu numbers them
_MX_GROUPS = (1, 1, 32)

MASK_SIDE = 2048
"""Rows and columns of the mask that causal attention asks for, whatever its length."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the result, 1 / root of the mean square, float32)."""
    result: tuple[Tensor, Tensor] = torch.ops.npu.npu_rms_norm(x_TD, weight_D, eps)
    return result


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in float32, of the weight."""
    result: tuple[Tensor, Tensor] = torch.ops.npu.npu_rms_norm_backward(grad_TD, x_TD, weight_D, inverse)
    return result


def rotary(x_1THR: Tensor, cos_1T1R: Tensor, sin_1T1R: Tensor, *, interleaved: bool) -> Tensor:
    mode = "interleave" if interleaved else "half"
    result: Tensor = torch.ops.npu.npu_rotary_mul(x_1THR, cos_1T1R, sin_1T1R, mode)
    return result


def swiglu(gate_up: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_swiglu(gate_up, -1)
    return result


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_swiglu_backward(grad, gate_up, -1)
    return result


def clipped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Gates cut off above the limit, ups on both sides."""
    result: Tensor = torch.ops.npu.npu_clipped_swiglu(
        gate_up, dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False
    )
    return result


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    query_ends: Sequence[int],
    key_ends: Sequence[int],
    *,
    scale: float,
    key_heads: int,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    pages: Tensor | None = None,
    page_size: int = 0,
) -> Tensor:
    """[T, H, V]. query: [T, H, K]. key, value: [S, G, K], or with `pages` [P, N, G K]. query_ends: where each
    sequence's tokens end. key_ends: the same of rows; with `pages` how many each has.
    """
    result, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
        query,
        key,
        value,
        query_rope=query_rope,
        key_rope=key_rope,
        atten_mask=mask,
        actual_seq_qlen=list(query_ends),
        actual_seq_kvlen=list(key_ends),
        block_table=pages,
        num_query_heads=query.shape[1],
        num_key_value_heads=key_heads,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=_CAUSAL,
        block_size=page_size,
    )
    found: Tensor = result
    return found


def lightning_indexer(
    query_TIK: Tensor,
    key: Tensor,
    weights_TI: Tensor,
    query_ends_B: Tensor,
    keys_B: Tensor,
    *,
    count: int,
    pages: Tensor | None,
) -> Tensor:
    """int32 [T, 1, count], the best first, then -1. key: [S, 1, K] with keys_B their ends, or with `pages` [P, N, 1, K]
    with keys_B their numbers.
    """
    result, _ = torch.ops.npu.npu_lightning_indexer(
        query_TIK,
        key,
        weights_TI,
        actual_seq_lengths_query=query_ends_B,
        actual_seq_lengths_key=keys_B,
        block_table=pages,
        layout_query="TND",
        layout_key="TND" if pages is None else "PA_BSND",
        sparse_count=count,
        sparse_mode=_CAUSAL,
    )
    found: Tensor = result
    return found


def sparse_attention(
    query: Tensor,
    key: Tensor,
    chosen_T1A: Tensor,
    query_ends_B: Tensor,
    key_ends_B: Tensor,
    *,
    query_rope: Tensor,
    key_rope: Tensor,
    scale: float,
) -> Tensor:
    """[T, H, V]: attention on the rows [S, 1, V] of each sequence that are chosen, int32, none after the first -1."""
    result, _, _ = torch.ops.npu.npu_sparse_flash_attention(
        query,
        key,
        key,
        chosen_T1A,
        scale,
        actual_seq_lengths_query=query_ends_B,
        actual_seq_lengths_kv=key_ends_B,
        query_rope=query_rope,
        key_rope=key_rope,
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="TND",
        sparse_mode=_CHOSEN_ALONE,
        attention_mode=_ABSORBED,
    )
    found: Tensor = result
    return found


def gating_top_k(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    count: int,
    groups: int,
    kept: int,
    by_best_two: bool,
    sigmoid: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(weights_TA, ids_TA int32). Weights of sigmoids are divided by their sum, those of softmax are not."""
    weights_TA, ids_TA, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE,
        count,
        bias=bias_E,
        k_group=kept,
        group_count=groups,
        group_select_mode=_BEST_TWO if by_best_two else _BEST,
        norm_type=_SIGMOID if sigmoid else _SOFTMAX,
        routed_scaling_factor=scale,
    )
    return weights_TA, ids_TA


def init_routing(x_TD: Tensor, ids_TA: Tensor, num_experts: int, *, quantised: bool) -> tuple[Tensor, ...]:
    """(rows by expert [T A, D], where each token's choices lie [T A] int32, rows of each expert [E] int64, scales of
    the rows where they are quantised to int8).
    """
    rows, places, counts, scales = torch.ops.npu.npu_moe_init_routing_v2(
        x_TD,
        ids_TA,
        active_num=ids_TA.numel(),
        expert_num=num_experts,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=_DYNAMIC_INT8 if quantised else _UNQUANTISED,
        active_expert_range=[0, num_experts],
        row_idx_type=_GATHER,
    )
    return rows, places, counts, scales


def grouped_matmul(
    rows_NK: Tensor,
    weight_EKF: Tensor,
    counts_E: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[N, F]: each expert's rows times its matrix. scales: of int8 weights [E, F] and of int8 rows [N]."""
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [rows_NK],
        [weight_EKF],
        scale=None if scales is None else [scales[0]],
        per_token_scale=None if scales is None else [scales[1]],
        group_list=counts_E,
        split_item=_SINGLE,
        group_type=_ROWS,
        group_list_type=_COUNTS,
        output_dtype=dtype,
    )
    found: Tensor = result
    return found


def dynamic_quant(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scales [N]): a row's largest magnitude becomes 127."""
    result: tuple[Tensor, Tensor] = torch.ops.npu.npu_dynamic_quant(x_NK)
    return result


def dynamic_mx_quant(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 codes, e8m0 scales [N, K / 64, 2]) in groups of 32."""
    result: tuple[Tensor, Tensor] = torch.ops.npu.npu_dynamic_mx_quant(x_NK, dst_type=_E4M3, scale_alg=_ROUNDED_UP)
    return result


def quant_matmul(codes_MK: Tensor, scales_M: Tensor, codes_KF: Tensor, scales_F: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, F] of int8 codes."""
    result: Tensor = torch.ops.npu.npu_quant_matmul(
        codes_MK, codes_KF, scales_F, pertoken_scale=scales_M, output_dtype=dtype
    )
    return result


def mx_matmul(codes_MK: Tensor, scales: Tensor, codes_KF: Tensor, other_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, F] of e4m3 codes. scales: [M, K / 64, 2]; other_scales: [K / 64, F, 2]."""
    result: Tensor = torch.ops.npu.npu_quant_matmul(
        codes_MK,
        codes_KF,
        other_scales,
        pertoken_scale=scales,
        output_dtype=dtype,
        scale_dtype=_E8M0,
        pertoken_scale_dtype=_E8M0,
        group_sizes=list(_MX_GROUPS),
    )
    return result
