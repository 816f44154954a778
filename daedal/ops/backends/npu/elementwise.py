"""Norms, rotation and gated units on the vendor's ops, with their gradients.

Rotation is computed in float32 whatever the type of x: its op wants one type for all, and angles rounded to 8 bits
would be wrong from the thousandth token on.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.backends.npu import supports, vendor
from daedal.ops.backends.npu.supports import BACKEND
from daedal.ops.registry import REGISTRY


@REGISTRY.register("rms_norm", BACKEND, supports=supports.rms_norm)
def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    weight = x_TD.new_ones(x_TD.shape[-1]) if weight_D is None else weight_D.to(x_TD.dtype)
    y_TD: Tensor = _RmsNorm.apply(x_TD, weight, eps)  # type: ignore[no-untyped-call]
    return y_TD


@REGISTRY.register("rotary", BACKEND, supports=supports.rotary)
def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    y_THR: Tensor = _Rotary.apply(x_THR, cos_TC, sin_TC, interleaved)  # type: ignore[no-untyped-call]
    return y_THR


@REGISTRY.register("swiglu", BACKEND, supports=supports.swiglu)
def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None) -> Tensor:
    return gated(torch.cat((gate_TF, up_TF), -1), limit)


def gated(gate_up: Tensor, limit: float | None) -> Tensor:
    """Of gates and ups side by side."""
    if limit is not None:
        return vendor.clipped_swiglu(gate_up, limit)
    y: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_TD, inverse = vendor.rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, inverse)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, inverse = ctx.saved_tensors
        grad_x, grad_weight = vendor.rms_norm_backward(grad_TD.contiguous(), x_TD, weight_D, inverse)
        return grad_x, grad_weight.to(weight_D.dtype), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        ctx.interleaved = interleaved
        return _rotate(x_THR, cos_TC, sin_TC, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THR: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotate(grad_THR, cos_TC, -sin_TC, ctx.interleaved), None, None, None


def _rotate(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool) -> Tensor:
    cos, sin = (_for_pairs(angle_TC, interleaved)[None, :, None] for angle_TC in (cos_TC, sin_TC))
    rotated = vendor.rotary(x_THR.float().contiguous()[None], cos, sin, interleaved=interleaved)
    return rotated[0].to(x_THR.dtype)


def _for_pairs(angle_TC: Tensor, interleaved: bool) -> Tensor:
    """[T, 2 C] float32: each pair's number at both of its places."""
    wide = angle_TC.float()
    return wide.repeat_interleave(2, -1) if interleaved else torch.cat((wide, wide), -1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return vendor.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return vendor.swiglu_backward(grad.contiguous(), gate_up)
