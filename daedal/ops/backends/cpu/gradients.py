"""Gradients of norms and gated units, the softmaxes of training, and experts' rows back to tokens, on native kernels.

The forward pass is the kernel that serving takes; kept for the backward pass are its inputs alone. Formulas stand in
`native/gradients.h`. Knows no ops.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.backends.cpu.program import TYPES, call, missing, native
from daedal.ops.registry import REGISTRY

# As in native/gradients.h.
ROW_BLOCKS = 64
LONGEST, WIDEST = 512, 512


def kernels_run(given: Tensor) -> bool:
    """Whether what works on `given` may take these kernels."""
    return given.device.type == "cpu" and given.numel() > 0 and REGISTRY.forced in (None, "cpu") and missing() is None


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
    if q_NtK.dtype != torch.bfloat16 or v_NtV.dtype != torch.bfloat16:
        return f"takes bfloat16, not {q_NtK.dtype} and {v_NtV.dtype}"
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


def target_surplus(logits_tV: Tensor, targets_t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-log p(target) of each token, and probabilities less one at the targets; logits: float32, overwritten.

    IndexError for a target that is no column: the kernel would write beyond the row.
    """
    least, most = (int(end) for end in targets_t.aminmax())
    if least < 0 or most >= logits_tV.shape[1]:
        wrong = least if least < 0 else most
        raise IndexError(f"target {wrong} is out of bounds: there are {logits_tV.shape[1]} logits for each token")
    nats_t = torch.empty(len(logits_tV))
    surplus_tV = logits_tV if dtype == logits_tV.dtype else torch.empty(logits_tV.shape, dtype=dtype)
    given = logits_tV, targets_t.contiguous(), nats_t
    call("target_surplus", *given, *logits_tV.shape, surplus_tV, TYPES[dtype])
    return nats_t, surplus_tV


def combine_rows(rows_PD: Tensor, places_N: Tensor, weights_TA: Tensor | None, tokens: int) -> Tensor:
    """y_TD: the sum of each token's rows by weight, or their plain sum. places_N: its rows, choice by choice."""
    dim = rows_PD.shape[1]
    y_TD = torch.empty((tokens, dim), dtype=rows_PD.dtype)
    weights = None if weights_TA is None else weights_TA.contiguous()
    size = tokens, len(places_N) // tokens, dim
    call("combine_rows", rows_PD.contiguous(), TYPES[rows_PD.dtype], places_N, weights, y_TD, *size)
    return y_TD


def combine_gradients(rows_PD: Tensor, places_N: Tensor, weights_TA: Tensor, push_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights, given y's; 0 for rows that are no token's."""
    rows, weights = rows_PD.contiguous(), weights_TA.contiguous()
    grad_PD, grad_TA = torch.zeros(rows.shape, dtype=rows.dtype), torch.empty(weights.shape)
    given = rows, TYPES[rows.dtype], places_N, weights, push_TD.contiguous()
    call("combine_gradients", *given, grad_PD, grad_TA, *weights.shape, rows.shape[1])
    return grad_PD, grad_TA
