"""Routing and experts: tokens in the order of their experts, two grouped products, and the sum of each token's experts;
of experts the gradients too.

Which rows belong to which expert is worked out on the device: nothing is read back, so a step waits for nobody.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops import reference
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.elementwise import rows
from daedal.ops.backends.triton.kernels import experts as kernels
from daedal.ops.backends.triton.kernels import routing
from daedal.ops.backends.triton.launch import block_of, stretches, tuned
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.trained import wants_gradients

_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
_COLUMNS = 1024
_MOST_ROWS = 128  # of a block

_GATE_UP = tuned(kernels.gate_up, spaces.EXPERTS, ["num_summed", "width", "BM"])
_MULTIPLY = tuned(kernels.multiply, spaces.EXPERTS, ["num_columns", "num_summed", "TRANSPOSED", "BM"])
_WEIGHT_GRADIENT = tuned(kernels.weight_gradient, spaces.WEIGHT_GRADIENT, ["num_left", "num_right"])


@REGISTRY.register("route", BACKEND, supports=supports.route)
def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring: str,
    method: str,
    num_active: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    given_TA: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    ids_TA = torch.empty((num_tokens, num_active), dtype=torch.int64, device=logits_TE.device)
    weights_TA = torch.empty((num_tokens, num_active), dtype=torch.float32, device=logits_TE.device)
    logits = rows(logits_TE.detach())
    kept = n_group if method == "greedy" else topk_group
    for part in stretches(num_tokens, 1, logits.device) if ids_TA.numel() else ():
        routing.route[(part.stop - part.start,)](
            logits[part], logits if bias_E is None else bias_E, ids_TA[part], weights_TA[part], num_experts,
            logits.stride(0), float(scale), SCORING=_SCORINGS.index(scoring), BIASED=bias_E is not None, GROUPS=n_group,
            KEPT=kept, PAIRS=method == "noaux_tc", ACTIVE=num_active, NORMALISED=normalise, BLOCK=block_of(num_experts),
            SLOTS=triton.next_power_of_2(num_active),
        )  # fmt: skip
    if not (torch.is_grad_enabled() and logits_TE.requires_grad):
        return ids_TA, weights_TA
    return reference.route(
        logits_TE,
        None,
        scoring=scoring,
        method=method,
        num_active=num_active,
        n_group=n_group,
        topk_group=topk_group,
        normalise=normalise,
        scale=scale,
        given_TA=ids_TA,
    )


@REGISTRY.register("experts", BACKEND, supports=supports.experts)
def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, *, limit: float | None
) -> Tensor:
    given = rows(x_TD), weights_TA, gate_up_EFD.contiguous(), down_EDF.contiguous()
    if wants_gradients(*given):
        y_TD: Tensor = _Experts.apply(*given, ids_TA, limit)  # type: ignore[no-untyped-call]
        return y_TD
    return _forward(*given, ids_TA, limit, keeps=False)[0]


@dataclass(frozen=True, eq=False)
class _Order:
    """Rows of experts one after the other, N of them, one for each expert of each token.

    tokens_N: each row's token. choices_N: its place in weights_TA. places_TA: each token's rows, by their experts'
    numbers, and sorted_TA: which choice each of them is. bounds: int32 [E + 1], where each expert's rows begin. tiles:
    as kernels read them, blocks of `block` rows.
    """

    tokens_N: Tensor
    choices_N: Tensor
    places_TA: Tensor
    sorted_TA: Tensor
    bounds: Tensor
    tiles: Tensor
    block: int

    @classmethod
    def of(cls, ids_TA: Tensor, num_experts: int) -> "_Order":
        active = ids_TA.shape[1]
        ids_TA, sorted_TA = ids_TA.sort(dim=-1, stable=True)  # a token's sum goes by the experts' numbers
        order_N = ids_TA.flatten().argsort(stable=True)
        tokens_N = order_N // active
        places_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        block = min(_MOST_ROWS, block_of(-(-len(order_N) // num_experts)))
        experts_E = torch.arange(num_experts, device=order_N.device)
        ends_E = torch.searchsorted(ids_TA.flatten()[order_N], experts_E, right=True)
        return cls(
            tokens_N=tokens_N,
            choices_N=tokens_N * active + sorted_TA.flatten()[order_N],
            places_TA=places_N.view(ids_TA.shape),
            sorted_TA=sorted_TA,
            bounds=F.pad(ends_E, (1, 0)).to(torch.int32),
            tiles=_tiles(ends_E, len(order_N), block),
            block=block,
        )


class _Experts(torch.autograd.Function):
    """Kept are both products before the gated unit; its result is worked out anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TA: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        ids_TA: Tensor,
        limit: float | None,
    ) -> Tensor:
        y_TD, kept_NF, ctx.order = _forward(x_TD, weights_TA, gate_up_EFD, down_EDF, ids_TA, limit, keeps=True)
        ctx.save_for_backward(x_TD, weights_TA, gate_up_EFD, down_EDF, kept_NF)
        ctx.limit = limit
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, gate_up_EFD, down_EDF, kept_NF = ctx.saved_tensors
        order: _Order | None = ctx.order
        wants_x, wants_weights, wants_up, wants_down = ctx.needs_input_grad[:4]
        if order is None:  # no rows: nobody was asked, and nobody has a share
            given = zip(ctx.needs_input_grad, ctx.saved_tensors[:4], strict=False)
            return *(torch.zeros_like(tensor) if wanted else None for wanted, tensor in given), None, None
        grad_TD = grad_TD.contiguous()
        grad_hidden = kept_NF.new_empty((kept_NF.shape[0], down_EDF.shape[2]), dtype=torch.float32)
        _multiply(grad_TD, down_EDF, order, grad_hidden, gathered=True, transposed=True)
        hidden_NF, grad_kept, grad_weights = _unit_backward(grad_hidden, kept_NF, weights_TA, order, ctx.limit)
        grad_x = grad_up = grad_down = None
        if wants_x:
            grad_rows = grad_TD.new_empty((kept_NF.shape[0], grad_TD.shape[1]), dtype=torch.float32)
            _multiply(grad_kept, gate_up_EFD, order, grad_rows, gathered=False, transposed=True)
            grad_x = _summed(grad_rows, order, None, torch.empty_like(grad_TD))
        if wants_up:
            grad_up = _weight_gradient(grad_kept, x_TD, order, torch.empty_like(gate_up_EFD), left_gathered=False)
        if wants_down:
            grad_down = _weight_gradient(grad_TD, hidden_NF, order, torch.empty_like(down_EDF), left_gathered=True)
        return grad_x, grad_weights if wants_weights else None, grad_up, grad_down, None, None


def _forward(
    x_TD: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    ids_TA: Tensor,
    limit: float | None,
    *,
    keeps: bool,
) -> tuple[Tensor, Tensor, _Order | None]:
    """y_TD and, where `keeps`, both products before the gated unit, [N, 2 F]. No order where there are no rows."""
    (num_tokens, num_columns), (num_experts, _, width) = x_TD.shape, down_EDF.shape
    num_rows = ids_TA.numel()
    y_TD = x_TD.new_empty((num_tokens, num_columns))
    kept_NF = x_TD.new_empty((num_rows if keeps else 0, 2 * width))
    if not y_TD.numel() or not num_rows:
        return y_TD.zero_(), kept_NF, None
    order = _Order.of(ids_TA, num_experts)
    hidden_NF = x_TD.new_empty((num_rows, width))
    result_ND = x_TD.new_empty((num_rows, num_columns), dtype=torch.float32)  # summed before it is rounded
    _GATE_UP[lambda meta: (order.tiles.shape[0], triton.cdiv(width, meta["BN"]))](
        x_TD, order.tokens_N, order.tiles, gate_up_EFD, hidden_NF, kept_NF, num_columns, width, x_TD.stride(0),
        float(limit or 0.0), LIMITED=limit is not None, KEPT=keeps, BM=order.block,
    )  # fmt: skip
    _multiply(hidden_NF, down_EDF, order, result_ND, gathered=False, transposed=False)
    return _summed(result_ND, order, weights_TA.gather(-1, order.sorted_TA), y_TD), kept_NF, order


def _multiply(x: Tensor, weight: Tensor, order: _Order, result: Tensor, *, gathered: bool, transposed: bool) -> None:
    num_columns = result.shape[1]
    _MULTIPLY[lambda meta: (order.tiles.shape[0], triton.cdiv(num_columns, meta["BN"]))](
        x, order.tokens_N, order.tiles, weight, result, x.shape[1], num_columns, x.stride(0),
        GATHERED=gathered, TRANSPOSED=transposed, BM=order.block,
    )  # fmt: skip


def _summed(rows_ND: Tensor, order: _Order, weights_TA: Tensor | None, y_TD: Tensor) -> Tensor:
    """Writes and returns y_TD: the sum of each token's rows."""
    num_tokens, num_columns = y_TD.shape
    kernels.gather_sum[(num_tokens, triton.cdiv(num_columns, _COLUMNS))](
        rows_ND, order.places_TA, rows_ND if weights_TA is None else weights_TA, y_TD, num_columns,
        WEIGHTED=weights_TA is not None, ACTIVE=order.places_TA.shape[1], BLOCK=_COLUMNS,
    )  # fmt: skip
    return y_TD


def _unit_backward(
    grad_hidden: Tensor, kept_NF: Tensor, weights_TA: Tensor, order: _Order, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighed result of each row's unit [N, F], the gradient of what was kept [N, 2 F], and that of weights_TA."""
    num_rows, width = grad_hidden.shape
    hidden_NF, grad_kept = kept_NF.new_empty((num_rows, width)), torch.empty_like(kept_NF)
    weights_TA = weights_TA.contiguous()
    grad_weights = torch.empty_like(weights_TA, dtype=torch.float32)
    kernels.unit_backward[(num_rows,)](
        grad_hidden, kept_NF, weights_TA, order.choices_N, hidden_NF, grad_kept, grad_weights, width,
        float(limit or 0.0), LIMITED=limit is not None, BLOCK=min(_COLUMNS, block_of(width)),
    )  # fmt: skip
    return hidden_NF, grad_kept, grad_weights.to(weights_TA.dtype)


def _weight_gradient(left: Tensor, right: Tensor, order: _Order, result: Tensor, *, left_gathered: bool) -> Tensor:
    """Writes and returns result [E, L, R]."""
    num_experts, num_left, num_right = result.shape
    _WEIGHT_GRADIENT[
        lambda meta: (triton.cdiv(num_left, meta["BM"]), triton.cdiv(num_right, meta["BN"]), num_experts)
    ](
        left, right, order.tokens_N, order.bounds, result, num_left, num_right, left.stride(0), right.stride(0),
        LEFT_GATHERED=left_gathered,
    )  # fmt: skip
    return result


def _tiles(ends_E: Tensor, num_rows: int, block: int) -> Tensor:
    """As kernels read it, [n, 3] int32: n is the most that so many rows can need, as their number is not known here."""
    num_experts = len(ends_E)
    most = num_rows // block + min(num_experts, num_rows)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    blocks_E = (counts_E + block - 1) // block
    last_E = blocks_E.cumsum(0)
    tiles_n = torch.arange(most, device=ends_E.device)
    expert_n = torch.searchsorted(last_E, tiles_n, right=True)
    known_n = expert_n.clamp(max=num_experts - 1)
    first_n = ends_E[known_n] - counts_E[known_n] + (tiles_n - last_E[known_n] + blocks_E[known_n]) * block
    expert_n = torch.where(expert_n < num_experts, expert_n, -1)
    return torch.stack((expert_n, first_n, ends_E[known_n]), 1).to(torch.int32)
