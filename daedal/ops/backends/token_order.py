"""Tokens into the order of their experts and back, with gradients, by gathering alone.

Every token has as many rows as it has experts, so the way back is a gather and a short sum. Indexing and adding by
index would do, but their gradients add row by row on one core. An expert's rows may be filled up to a multiple of a
unit: oneDNN makes a program for every shape of a product, which takes longer than the product if no shape ever comes
again. On a CPU with native kernels those gather and sum in one pass. Knows no experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops.backends.cpu import gradients

_WIDEST = 128


@dataclass(frozen=True, eq=False)
class Order:
    """Rows of experts one after the other. source_P: each row's token; rows that only fill up name any.

    places_N: of each token's rows, in the order of its choices. ends_E: int32, where each expert's rows end.
    """

    source_P: Tensor
    places_N: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, ids_TA: Tensor, num_experts: int, *, fills: bool) -> "Order":
        """fills: up to a multiple of a unit that costs an eighth more rows at most, on average."""
        ids_N = ids_TA.flatten()
        order_N = ids_N.argsort(stable=True)
        sorted_N = ids_N[order_N]
        # Searched and not counted: of a device's counts the host would have to read how many there are.
        last_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=ids_N.device), right=True)
        counts_E = last_E.diff(prepend=last_E.new_zeros(1))
        unit = _unit(ids_N.shape[0] // num_experts) if fills else 1
        filled_E = -(-counts_E // unit) * unit
        ends_E = filled_E.cumsum(0)
        shift_E = ends_E - filled_E - (last_E - counts_E)
        rows_N = torch.arange(ids_N.shape[0], device=ids_N.device) + shift_E[sorted_N]
        num_rows = int(ends_E[-1]) if unit > 1 else ids_N.shape[0]
        source_P = order_N.new_zeros(num_rows).scatter_(0, rows_N, order_N // ids_TA.shape[1])
        places_N = torch.empty_like(order_N).scatter_(0, order_N, rows_N)
        return cls(source_P, places_N, ends_E.to(torch.int32))


def _unit(mean: int) -> int:
    """The largest power of two that is at most a quarter of the mean count; half of it is filled on average."""
    return min(_WIDEST, 1 << max(0, (mean // 4).bit_length() - 1))


def dispatch(x_TD: Tensor, order: Order) -> Tensor:
    """rows_PD, each a token's."""
    rows_PD: Tensor = _Dispatch.apply(x_TD, order)  # type: ignore[no-untyped-call]
    return rows_PD


def combine(rows_PD: Tensor, weights_TA: Tensor, order: Order) -> Tensor:
    """y_TD: the sum of each token's rows by weight, in float32, rounded once to the rows' dtype; the way back."""
    y_TD: Tensor = _Combine.apply(rows_PD, weights_TA, order)  # type: ignore[no-untyped-call]
    return y_TD


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order) -> Tensor:
        ctx.order, ctx.shape = order, (x_TD.shape[0], -1)
        return x_TD.index_select(0, order.source_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        places_N: Tensor = ctx.order.places_N
        if _has_kernel(grad_PD):
            return gradients.combine_rows(grad_PD, places_N, None, ctx.shape[0]), None
        return grad_PD.index_select(0, places_N).unflatten(0, ctx.shape).sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, weights_TA: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows_PD, weights_TA)
        ctx.order = order
        if _has_kernel(rows_PD, weights_TA):
            return gradients.combine_rows(rows_PD, order.places_N, weights_TA, len(weights_TA))
        apart_TAD = rows_PD.index_select(0, order.places_N).unflatten(0, weights_TA.shape)
        summed_TD: Tensor = (apart_TAD * weights_TA.unsqueeze(-1)).sum(1)
        return summed_TD.to(rows_PD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_PD, weights_TA = ctx.saved_tensors
        places_N = ctx.order.places_N
        if _has_kernel(rows_PD, weights_TA):
            return *gradients.combine_gradients(rows_PD, places_N, weights_TA, grad_TD), None
        apart_TAD = rows_PD.index_select(0, places_N).unflatten(0, weights_TA.shape)
        grad_T1D = grad_TD.unsqueeze(1)
        grad_TA = (apart_TAD * grad_T1D.float()).sum(-1)
        grad_ND = (grad_T1D * weights_TA.unsqueeze(-1)).to(rows_PD.dtype).flatten(0, 1)
        grad_PD = torch.zeros_like(rows_PD).index_copy_(0, places_N, grad_ND)
        return grad_PD, grad_TA.to(weights_TA.dtype), None


def _has_kernel(rows_PD: Tensor, weights_TA: Tensor | None = None) -> bool:
    weighed = weights_TA is None or weights_TA.dtype == torch.float32
    return rows_PD.dtype in (torch.bfloat16, torch.float32) and weighed and gradients.kernels_run(rows_PD)
