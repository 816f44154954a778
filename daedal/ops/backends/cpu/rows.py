"""Norms, rotation, gated units and routing on native kernels."""

import torch
from torch import Tensor

from daedal.ops.backends.cpu.program import TYPES, call, missing
from daedal.ops.registry import REGISTRY

BACKEND = "cpu"


def declines(*tensors: Tensor | None) -> str | None:
    """Why native kernels cannot take these tensors; what every op of this backend asks first."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"runs on the CPU, not on {tensor.device}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
    return missing()


def _rms_norm_supports(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> str | None:
    types = [tensor.dtype for tensor in (x_TD, weight_D) if tensor is not None]
    if any(dtype not in (torch.bfloat16, torch.float32) for dtype in types):
        return f"takes bfloat16 and float32, not {types[0]}"
    return declines(x_TD, weight_D)


@REGISTRY.register("rms_norm", BACKEND, supports=_rms_norm_supports)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    rows_ND = _rows(x_TD)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    weight = None if weight_D is None else weight_D.contiguous()
    weight_type = 0 if weight is None else TYPES[weight.dtype]
    num_rows, dim = rows_ND.shape
    call(
        "rms_norm", rows_ND, rows_ND.stride(0), TYPES[x_TD.dtype], weight, weight_type, y_TD, num_rows, dim, float(eps)
    )
    return y_TD


def _rows(x: Tensor) -> Tensor:
    """[N, D] with its last axis dense: a view where the leading axes fold into one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()
