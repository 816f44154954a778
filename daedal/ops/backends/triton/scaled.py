"""Products in eight bits: factors rounded by one kernel, multiplied by another; gradients as `ops.scaled` has them.

Where the chip's units take e4m3 as it is, codes are kept in eight bits; else in bfloat16, which holds them exactly, so
that every chip gives the same numbers up to the order of its sums. Codes of int8 stay int8 everywhere.
"""

import torch
import triton
from torch import Tensor

from daedal.ops import scaled, silicon
from daedal.ops.arithmetic import Arithmetic, Rounding
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.kernels import scaled as kernels
from daedal.ops.backends.triton.launch import block_of, tuned
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY

_LARGEST = {"e4m3": 448.0, "int8": 127.0}
_MOST_ROWS = 128  # of a block of a product
_ROWS = 16  # rows that one program rounds, where each has its own scale

_MULTIPLY = tuned(kernels.multiply, spaces.MULTIPLY, ["num_columns", "num_summed", "BM"])


def quantise(x_MK: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and float32 scales [M / across, K / along], rounded up; what `arithmetic.quantise` gives."""
    num_rows, num_columns = x_MK.shape
    assert rounding.along is not None
    assert rounding.across is not None
    blocks, groups = triton.cdiv(num_rows, rounding.across), triton.cdiv(num_columns, rounding.along)
    codes = torch.empty((num_rows, num_columns), dtype=_code_type(rounding, x_MK.device), device=x_MK.device)
    scales = torch.empty((blocks, groups), dtype=torch.float32, device=x_MK.device)
    shared = rounding.across > 1
    rows = rounding.across if shared else _ROWS
    if codes.numel():
        kernels.quantise[(triton.cdiv(num_rows, rows), groups)](
            x_MK, codes, scales, num_rows, num_columns, x_MK.stride(0), x_MK.stride(1), groups,
            ROWS=rows, GROUP=rounding.along, SHARED=shared, LARGEST=_LARGEST[rounding.element],
            POWER_OF_TWO=rounding.scale == "power_of_two", INTEGER=rounding.element == "int8",
        )  # fmt: skip
    return codes, scales


def multiply(
    left_MK: Tensor, left_rounding: Rounding, right_NK: Tensor, right_rounding: Rounding, dtype: torch.dtype
) -> Tensor:
    """[M, N], a `scaled.Product`."""
    (num_rows, num_summed), num_columns = left_MK.shape, right_NK.shape[0]
    result = torch.empty((num_rows, num_columns), dtype=dtype, device=left_MK.device)
    if not num_summed:
        return result.zero_()
    if result.numel():
        left, left_scales = quantise(left_MK, left_rounding)
        right, right_scales = quantise(right_NK, right_rounding)

        block = min(_MOST_ROWS, block_of(num_rows))
        _MULTIPLY[lambda meta: (triton.cdiv(num_rows, block), triton.cdiv(num_columns, meta["BN"]))](
            left, left_scales, right, right_scales, result, num_rows, num_columns, num_summed, left_scales.shape[1],
            left_rounding.across, right_rounding.across,
            GROUP=left_rounding.along, INTEGER=left_rounding.element == "int8", BM=block,
        )  # fmt: skip
    return result


@REGISTRY.register("scaled_linear", BACKEND, supports=supports.scaled_linear)
def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> Tensor:
    return scaled.linear(x_TD, weight_FD, arithmetic, multiply)


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
    return scaled.experts(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, arithmetic, limit, multiply)


def _code_type(rounding: Rounding, device: torch.device) -> torch.dtype:
    if rounding.element == "int8":
        return torch.int8
    return torch.float8_e4m3fn if silicon.of(device).multiplies(torch.float8_e4m3fn) else torch.bfloat16
