"""The reference of products in a declared arithmetic: factors rounded one by one, products and sums in float32.

float64 stays float64, so that tests can check against exact sums. Runs on every device; what a matrix unit for the
format would sum in another order or in fewer bits is not imitated.
"""

import torch
from torch import Tensor

from daedal.ops import scaled
from daedal.ops.arithmetic import Arithmetic, Rounding, quantise_dequantise
from daedal.ops.reference import wide
from daedal.ops.registry import REFERENCE, REGISTRY


def multiply(
    left_MK: Tensor, left_rounding: Rounding, right_NK: Tensor, right_rounding: Rounding, dtype: torch.dtype
) -> Tensor:
    """[M, N], a `scaled.Product`."""
    left = quantise_dequantise(wide(left_MK), left_rounding)
    return (left @ quantise_dequantise(wide(right_NK), right_rounding).T.to(left.dtype)).to(dtype)


@REGISTRY.register("scaled_linear", REFERENCE)
def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> Tensor:
    return scaled.linear(x_TD, weight_FD, arithmetic, multiply)


@REGISTRY.register("scaled_experts", REFERENCE)
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
    return scaled.experts(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, arithmetic, limit, multiply)
