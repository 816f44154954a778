"""Causal attention of short sequences with gradients on a CPU: scores are written out, and products do the work.

torch's fused kernel never writes scores, which saves memory at length; its backward pass takes two and a half times as
long as a few batched products where a sequence has some hundred tokens. For bfloat16: scores and softmax are
float32, the shares are kept in bfloat16. Knows no rows and no batches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.softmaxes import causal_gradients, causal_shares

LONGEST = 512
"""Tokens up to which it is chosen: kept shares of all heads then take as much as a few of the layer's activations."""


def short_attention(q_NtK: Tensor, k_NtK: Tensor, v_NtV: Tensor, *, scale: float) -> Tensor:
    """o_NtV: N sequences and heads apart, each whole, each query seeing the keys up to its own."""
    o_NtV: Tensor = _ShortAttention.apply(q_NtK, k_NtK, v_NtV, scale)  # type: ignore[no-untyped-call]
    return o_NtV


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NtK: Tensor, k_NtK: Tensor, v_NtV: Tensor, scale: float) -> Tensor:
        shares_Ntt = causal_shares(q_NtK, k_NtK, scale)
        o_NtV = torch.bmm(shares_Ntt, v_NtV)
        ctx.save_for_backward(q_NtK, k_NtK, v_NtV, shares_Ntt)
        ctx.scale = scale
        return o_NtV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NtV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NtK, k_NtK, v_NtV, shares_Ntt = ctx.saved_tensors
        grad_Ntt = causal_gradients(grad_NtV, v_NtV, shares_Ntt, ctx.scale)
        grad_v_NtV = torch.bmm(shares_Ntt.mT, grad_NtV)
        return torch.bmm(grad_Ntt, k_NtK), torch.bmm(grad_Ntt.mT, q_NtK), grad_v_NtV, None
