"""RMS norm with its gradients in as few passes over memory as PyTorch's elementwise kernels allow.

torch has no fused RMS norm on a CPU: what it composes keeps several float32 copies of the input for the backward pass,
and each of its gradients is a pass of its own. Here the input and one number for each row are kept. Knows no layers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def trained_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (float64 stays), rounded once to x's dtype."""
    y_TD: Tensor = _TrainedNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return y_TD


class _TrainedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        squares_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide).square_()
        inverse_T1 = squares_T1.div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        normed_TD: Tensor = x_TD * inverse_T1
        return normed_TD.mul_(weight_D.to(wide)).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        normed_TD = x_TD * inverse_T1
        grad_D = (grad_TD * normed_TD).flatten(0, -2).sum(0).to(weight_D.dtype)
        along_TD = grad_TD * weight_D.to(normed_TD.dtype)
        share_T1 = torch.linalg.vecdot(along_TD, normed_TD).unsqueeze(-1).div_(x_TD.shape[-1])
        grad_x_TD = along_TD.addcmul_(normed_TD, share_T1, value=-1).mul_(inverse_T1)
        return grad_x_TD.to(x_TD.dtype), grad_D, None
