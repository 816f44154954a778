"""Backend `cublas`: FP8 products with 1 x 128 tiles and 128 x 128 blocks on the units of compute capability 9.

cuBLAS 12.9 multiplies e4m3 codes under one float32 scale for each tile or block, through `F.scaled_mm`; later devices
have other scales, and earlier ones no FP8. It asks for the left matrix by rows, the right one by columns, and scales
whose first axis is the contiguous one, those of blocks padded to a multiple of four. Rows and summed columns are padded
here to multiples of 128; nought changes no sum. Held to the reference by tests that need such a device (docs/gpu.md).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from daedal.ops import scaled, silicon
from daedal.ops.arithmetic import FP8, Arithmetic, Rounding, quantise
from daedal.ops.registry import REGISTRY

BACKEND = "cublas"

_TILE, _BLOCK = FP8.activations, FP8.weights
_GROUP = 128
_TARGET = "sm_90"
_CUDA = (12, 9)


def multiply(
    left_MK: Tensor, left_rounding: Rounding, right_NK: Tensor, right_rounding: Rounding, dtype: torch.dtype
) -> Tensor:
    """[M, N], a `scaled.Product`."""
    rows, columns = left_MK.shape[0], right_NK.shape[0]
    if not left_MK.numel():
        return left_MK.new_zeros((rows, columns), dtype=dtype)
    assert left_rounding == _TILE
    left, left_scale, _ = operand(left_MK, left_rounding)
    right, right_scale, recipe = operand(right_NK, right_rounding)
    product: Tensor = F.scaled_mm(
        left, right.T, left_scale, ScalingType.BlockWise1x128, right_scale, recipe, output_dtype=dtype
    )
    return product[:rows, :columns]


def operand(x_MK: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor, ScalingType]:
    """Codes e4m3 [M, K], both padded to multiples of 128, and scales as cuBLAS reads them: of tiles [M, K / 128], of
    blocks [K / 128, M / 128] with the first axis padded to a multiple of 4; the first axis is contiguous.
    """
    rows, columns = x_MK.shape
    codes, scale = quantise(F.pad(x_MK, (0, -columns % _GROUP, 0, -rows % _GROUP)), rounding)
    codes = codes.to(torch.float8_e4m3fn).contiguous()
    if rounding == _TILE:
        return codes, scale.T.contiguous().T, ScalingType.BlockWise1x128
    assert rounding == _BLOCK
    return codes, F.pad(scale, (0, -scale.shape[1] % 4), value=1.0).contiguous().T, ScalingType.BlockWise128x128


def _supports(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> str | None:
    if (arithmetic.activations, arithmetic.weights, arithmetic.gradients) != (_TILE, _BLOCK, _TILE):
        return f"multiplies e4m3 in tiles of 1x128 and blocks of 128x128 alone, which {arithmetic.name} is not"
    profile = silicon.of(x_TD.device)
    if profile.target != _TARGET:
        return f"has these products on NVIDIA's {_TARGET} alone, and this is {profile.name}"
    if torch.version.cuda is not None and tuple(int(part) for part in torch.version.cuda.split(".")[:2]) < _CUDA:
        return f"has these products from CUDA 12.9, and torch was built for {torch.version.cuda}"
    for dtype in (x_TD.dtype, weight_FD.dtype):
        if dtype not in (torch.bfloat16, torch.float32):
            return f"gives bfloat16 and float32, not {dtype}"
    if any(size % _GROUP for size in weight_FD.shape[-2:]):
        return f"needs weights of whole blocks, and these are {[*weight_FD.shape[-2:]]}"
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
    return _supports(x_TD, gate_up_EFD, arithmetic) or _supports(x_TD, down_EDF, arithmetic)


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
