"""Backend `aten`: rounded factors multiplied on bfloat16 matrix units, with sums in float32.

Numbers rounded under power-of-two scales are exact in bfloat16 and their products exact in float32, so the result is
the reference's up to the order of the sum. On a CPU torch multiplies bfloat16 into bfloat16 only: there it serves
results of that dtype, and a float32 result (the gradient of master weights) comes from a float32 product.
"""

import torch
from torch import Tensor

from daedal.ops import reference_scaled, scaled, silicon
from daedal.ops.arithmetic import Arithmetic, Rounding, quantise_dequantise
from daedal.ops.backends.aten import BACKEND
from daedal.ops.registry import REGISTRY


def multiply(
    left_MK: Tensor, left_rounding: Rounding, right_NK: Tensor, right_rounding: Rounding, dtype: torch.dtype
) -> Tensor:
    """[M, N], a `scaled.Product`."""
    on_cuda = left_MK.device.type == "cuda"
    if dtype != torch.bfloat16 and not on_cuda:
        return reference_scaled.multiply(left_MK, left_rounding, right_NK, right_rounding, dtype)
    left = quantise_dequantise(left_MK, left_rounding).bfloat16()
    right = quantise_dequantise(right_NK, right_rounding).bfloat16()
    if dtype == torch.bfloat16:
        return left @ right.T
    return torch.mm(left, right.T, out_dtype=torch.float32).to(dtype)


def _supports(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> str | None:
    if not arithmetic.fits_bfloat16:
        return f"{arithmetic.name} has float32 scales, under which numbers are not exact in bfloat16"
    kind = silicon.of(x_TD.device).device
    if kind == "cuda":
        return f"rounds to bfloat16, which {x_TD.dtype} asks not to" if x_TD.dtype == torch.float64 else None
    if kind != "cpu":
        return f"float32 sums of bfloat16 products are not established on {kind}"
    if x_TD.dtype != torch.bfloat16:
        return f"on a CPU bfloat16 products give bfloat16 results, and these are {x_TD.dtype}"
    return None


@REGISTRY.register("scaled_linear", BACKEND, supports=_supports)
def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> Tensor:
    return scaled.linear(x_TD, weight_FD, arithmetic, multiply)


def _experts_supports(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    arithmetic: Arithmetic,
    *,
    limit: float | None,
) -> str | None:
    return _supports(x_TD, gate_up_EFD, arithmetic)


@REGISTRY.register("scaled_experts", BACKEND, supports=_experts_supports)
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
