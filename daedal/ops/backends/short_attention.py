"""Causal attention of short sequences with gradients on a CPU: scores are written out, and products do the work.

torch's fused kernel never writes scores, which saves memory at length; its backward pass takes two and a half times as
long as a few batched products where a sequence has some hundred tokens. For bfloat16: scores and softmax are
float32, the shares are kept in bfloat16. Knows no rows and no batches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.narrow_factors import narrow_factors

LONGEST = 512
"""Tokens up to which it is chosen: kept shares of all heads then take as much as a few of the layer's activations."""


def short_attention(q_NtK: Tensor, k_NtK: Tensor, v_NtV: Tensor, *, scale: float) -> Tensor:
    """o_NtV: N sequences and heads apart, each whole, each query seeing the keys up to its own."""
    o_NtV: Tensor = _ShortAttention.apply(q_NtK, k_NtK, v_NtV, scale)  # type: ignore[no-untyped-call]
    return o_NtV


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NtK: Tensor, k_NtK: Tensor, v_NtV: Tensor, scale: float) -> Tensor:
        length = q_NtK.shape[1]
        hidden_tt = torch.full((length, length), float("-inf"), device=q_NtK.device).triu_(1)
        with narrow_factors(q_NtK.device):
            scores_Ntt = torch.bmm(q_NtK.float(), k_NtK.float().mT)
        shares_Ntt = scores_Ntt.mul_(scale).add_(hidden_tt).softmax(-1, dtype=torch.float32).to(q_NtK.dtype)
        o_NtV = torch.bmm(shares_Ntt, v_NtV)
        ctx.save_for_backward(q_NtK, k_NtK, v_NtV, shares_Ntt)
        ctx.scale = scale
        return o_NtV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NtV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NtK, k_NtK, v_NtV, shares_Ntt = ctx.saved_tensors
        with narrow_factors(q_NtK.device):
            wanted_Ntt = torch.bmm(grad_NtV.float(), v_NtV.float().mT)
        softened_Ntt = torch._softmax_backward_data(wanted_Ntt, shares_Ntt.float(), -1, torch.float32)
        grad_Ntt = softened_Ntt.mul_(ctx.scale).to(q_NtK.dtype)
        grad_v_NtV = torch.bmm(shares_Ntt.mT, grad_NtV)
        return torch.bmm(grad_Ntt, k_NtK), torch.bmm(grad_Ntt.mT, q_NtK), grad_v_NtV, None
