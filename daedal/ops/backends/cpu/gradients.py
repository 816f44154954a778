"""Gradients of norms and gated units, and the softmaxes of training, on native kernels.

The forward pass is the kernel that serving takes; kept for the backward pass are its inputs alone. Formulas stand in
`native/gradients.h`. Knows no ops.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.backends.cpu.program import TYPES, call, native

# As in native/gradients.h.
ROW_BLOCKS = 64
LONGEST, WIDEST = 512, 512


class TrainedNorm(torch.autograd.Function):
    """x_ND, weight_D and eps to `norm(x_ND, weight_D, eps)`, which is the first argument."""

    @staticmethod
    def forward(ctx: Any, norm: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        y_ND: Tensor = norm(x_ND, weight_D, eps)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, push_ND: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x_ND, weight_D = ctx.saved_tensors
        rows, dim = x_ND.shape
        grad_ND, grad_D = torch.empty((rows, dim), dtype=x_ND.dtype), torch.empty(dim)
        sums = torch.empty((min(ROW_BLOCKS, rows), dim))
        weight, push_ND = weight_D.contiguous(), push_ND.contiguous()
        types = TYPES[x_ND.dtype], TYPES[weight.dtype]
        size = rows, dim, float(ctx.eps)
        call("norm_gradients", x_ND, x_ND.stride(0), types[0], weight, push_ND, grad_ND, *size, sums, grad_D, types[1])
        return None, grad_ND, grad_D.to(weight_D.dtype), None


class TrainedGate(torch.autograd.Function):
    """gate_NF, up_NF and limit to `gated(gate_NF, up_NF, limit=limit)`, which is the first argument."""

    @staticmethod
    def forward(ctx: Any, gated: Any, gate_NF: Tensor, up_NF: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.limit = math.inf if limit is None else float(limit)
        y_NF: Tensor = gated(gate_NF, up_NF, limit=limit)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, push_NF: Tensor) -> tuple[None, Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grads = torch.empty((2, *gate.shape), dtype=gate.dtype)
        given = gate, gate.stride(0), up, up.stride(0), TYPES[gate.dtype], push_NF.contiguous()
        call("swiglu_gradients", *given, grads[0], grads[1], *gate.shape, ctx.limit)
        return None, grads[0], grads[1], None


def causal_declines(q_NtK: Tensor, v_NtV: Tensor) -> str | None:
    """Why `causal_shares` and `causal_gradients` cannot take these."""
    if q_NtK.shape[1] > LONGEST or any(width > WIDEST or width % 32 for width in (q_NtK.shape[2], v_NtV.shape[2])):
        return f"takes up to {LONGEST} tokens, and widths up to {WIDEST} that are multiples of 32"
    if native().level not in ("amx", "avx512"):
        return "has no products of bfloat16"
    return None


def causal_shares(q_NtK: Tensor, k_NtK: Tensor, scale: float) -> Tensor:
    """shares_Ntt in bfloat16, as q and k are: row i is the softmax of the query's products with its first i + 1 keys,
    times `scale`, and 0 behind them.
    """
    count, length, dim = q_NtK.shape
    shares_Ntt = torch.empty((count, length, length), dtype=torch.bfloat16)
    call("causal_shares", q_NtK.contiguous(), k_NtK.contiguous(), shares_Ntt, count, length, dim, float(scale))
    return shares_Ntt


def causal_gradients(push_NtV: Tensor, v_NtV: Tensor, shares_Ntt: Tensor, scale: float) -> Tensor:
    """Gradients of the products of `causal_shares` in bfloat16. push: of the weighted values."""
    count, length, dim = push_NtV.shape
    grad_Ntt = torch.empty_like(shares_Ntt)
    given = push_NtV.contiguous(), v_NtV.contiguous(), shares_Ntt
    call("causal_gradients", *given, grad_Ntt, count, length, dim, float(scale))
    return grad_Ntt


def target_surplus(logits_tV: Tensor, targets_t: Tensor) -> Tensor:
    """-log p(target) of each token, float32; logits (float32) become probabilities, less one at the targets."""
    nats_t = torch.empty(len(logits_tV))
    call("target_surplus", logits_tV, targets_t.contiguous(), nats_t, *logits_tV.shape)
    return nats_t
