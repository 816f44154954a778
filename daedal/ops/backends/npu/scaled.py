"""Products in eight bits on the vendor's ops: int8 codes with a scale for each row, or e4m3 codes in groups of 32.

The first is what Atlas A2 and A3 have, which lack FP8; the second what Ascend 950 has. Which of both an arithmetic asks
for is in its roundings; whether the chip has it is said by `supports`.
"""

import torch
from torch import Tensor

from daedal.ops import scaled
from daedal.ops.arithmetic import MXFP8, Arithmetic, Rounding
from daedal.ops.backends.npu import supports, vendor
from daedal.ops.backends.npu.elementwise import gated
from daedal.ops.backends.npu.experts import by_expert, summed
from daedal.ops.backends.npu.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.turning import turn


def multiply(
    left_MK: Tensor, left_rounding: Rounding, right_NK: Tensor, right_rounding: Rounding, dtype: torch.dtype
) -> Tensor:
    """[M, N], a `scaled.Product`."""
    if not left_MK.numel():
        return left_MK.new_zeros((left_MK.shape[0], right_NK.shape[0]), dtype=dtype)
    left, right = left_MK.contiguous(), right_NK.contiguous()
    if left_rounding == MXFP8.activations:
        codes_MK, scales = vendor.dynamic_mx_quant(left)
        codes_NK, other_scales = vendor.dynamic_mx_quant(right)
        return vendor.mx_matmul(codes_MK, scales, codes_NK.T, other_scales.transpose(0, 1), dtype)
    codes_MK, scales_M = vendor.dynamic_quant(left)
    codes_NK, scales_N = vendor.dynamic_quant(right)
    return vendor.quant_matmul(codes_MK, scales_M, codes_NK.T, scales_N, dtype)


@REGISTRY.register("scaled_linear", BACKEND, supports=supports.scaled_linear)
def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> Tensor:
    leading = x_TD.shape[:-1]
    product = scaled.turning(multiply, arithmetic.turned)
    y_TF = product(x_TD.flatten(0, -2), arithmetic.activations, weight_FD, arithmetic.weights, x_TD.dtype)
    return y_TF.view(*leading, weight_FD.shape[0])


@REGISTRY.register("scaled_experts", BACKEND, supports=supports.scaled_experts)
def scaled_experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    arithmetic: Arithmetic,
    *,
    limit: float | None,
) -> Tensor:
    if arithmetic.activations == MXFP8.activations:
        return scaled.experts(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, arithmetic, limit, multiply)
    ids_TA, weights_TA = by_expert(ids_TA, weights_TA)
    block = arithmetic.turned
    codes_ND, places_N, counts_E, scales_N = vendor.init_routing(
        turn(x_TD, block).contiguous(), ids_TA, gate_up_EFD.shape[0], quantised=True
    )
    gate_up_NF = _grouped(codes_ND, scales_N, turn(gate_up_EFD, block), counts_E, x_TD.dtype)
    codes_NF, scales_N = vendor.dynamic_quant(turn(gated(gate_up_NF, limit), block))
    return summed(_grouped(codes_NF, scales_N, turn(down_EDF, block), counts_E, x_TD.dtype), places_N, weights_TA)


def _grouped(codes_NK: Tensor, scales_N: Tensor, weight_EFK: Tensor, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, F]: int8 rows times the matrices of their experts."""
    weight_codes, weight_scales = vendor.dynamic_quant(weight_EFK.contiguous())
    # What the op takes beside results of each type; rounding to bfloat16 is no more than that of the results.
    weight_scales = weight_scales.bfloat16() if dtype == torch.bfloat16 else weight_scales
    scales = weight_scales, scales_N
    return vendor.grouped_matmul(codes_NK, weight_codes.transpose(1, 2), counts_E, scales=scales, dtype=dtype)
