"""Linear layers and experts in a declared arithmetic, as one autograd function for every backend.

All three products of a linear layer are written left right^T, summed over the last axis of both, which is the one form
that matrix units with scales read. A backend brings that product alone. Kept for the backward pass are x and the weight
as they were given, not their rounded forms: x is mostly held by a neighbouring op already, the weight is a parameter
that a sharded trainer may free and gather again, and wgrad rounds x anew along the tokens whatever was kept. The price
is a second rounding of the weight. Knows no backend.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.arithmetic import Arithmetic, Rounding
from daedal.ops.registry import REGISTRY
from daedal.ops.turning import turn

# (left_MK, its rounding, right_NK, its rounding, dtype of the result) to [M, N].
Product = Callable[[Tensor, Rounding, Tensor, Rounding, torch.dtype], Tensor]


def turning(product: Product, block: int | None) -> Product:
    """The same product of factors that are turned first."""
    if block is None:
        return product

    def turned(left_MK: Tensor, left: Rounding, right_NK: Tensor, right: Rounding, dtype: torch.dtype) -> Tensor:
        return product(turn(left_MK, block), left, turn(right_NK, block), right, dtype)

    return turned


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic, product: Product) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_TD if wants_weight else None, weight_FD if wants_x else None)
        product = turning(product, arithmetic.turned)
        ctx.arithmetic, ctx.product = arithmetic, product
        ctx.dtypes = x_TD.dtype, weight_FD.dtype
        return product(x_TD, arithmetic.activations, arithmetic.as_stored(weight_FD), arithmetic.weights, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TD, weight_FD = ctx.saved_tensors
        arithmetic: Arithmetic = ctx.arithmetic
        product: Product = ctx.product
        of_x, of_weight = ctx.dtypes
        grad_x = grad_weight = None
        if weight_FD is not None:
            weight_DF = arithmetic.as_stored(weight_FD).T
            grad_x = product(grad_TF, arithmetic.gradients, weight_DF, arithmetic.weights, of_x)
        if x_TD is not None:
            grad_weight = product(grad_TF.T, arithmetic.gradients, x_TD.T, arithmetic.activations, of_weight)
        return grad_x, grad_weight, None, None


def linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic, product: Product) -> Tensor:
    """`ops.scaled_linear` on a backend's product."""
    leading = x_TD.shape[:-1]
    flat_TD = x_TD.reshape(math.prod(leading), x_TD.shape[-1])
    y_TF: Tensor = _ScaledLinear.apply(flat_TD, weight_FD, arithmetic, product)  # type: ignore[no-untyped-call]
    return y_TF.reshape(*leading, weight_FD.shape[0])


def experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    arithmetic: Arithmetic,
    limit: float | None,
    product: Product,
) -> Tensor:
    """`ops.scaled_experts` on a backend's product: tokens sorted by expert, none dropped."""
    ids_N = ids_TA.flatten()
    order_N = ids_N.argsort(stable=True)
    counts = torch.bincount(ids_N, minlength=gate_up_EFD.shape[0]).tolist()
    tokens_N = order_N // ids_TA.shape[1]
    results = []
    # Without any token the experts still run, so that all weights have gradients, of nought.
    for rows_nD, gate_up_FD, down_DF in zip(
        x_TD[tokens_N].split(counts), gate_up_EFD.unbind(), down_EDF.unbind(), strict=True
    ):
        if rows_nD.shape[0] or not ids_N.shape[0]:
            gate, up = linear(rows_nD, gate_up_FD, arithmetic, product).chunk(2, -1)
            hidden_nF = REGISTRY.call("swiglu", gate, up, limit=limit)
            results.append(linear(hidden_nF, down_DF, arithmetic, product))
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    weighted_ND = torch.cat(results).to(wide) * weights_TA.flatten()[order_N].unsqueeze(-1)
    total_TD = torch.zeros_like(x_TD, dtype=wide).index_add(0, tokens_N, weighted_ND)
    return total_TD.to(x_TD.dtype)
