"""Routing and experts: tokens in the order of their experts, two grouped products, and the sum of each token's experts.

Which rows belong to which expert is worked out on the device: nothing is read back, so a step waits for nobody.
"""

import torch
import triton
from torch import Tensor

from daedal.ops import reference
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.elementwise import rows
from daedal.ops.backends.triton.kernels import experts as kernels
from daedal.ops.backends.triton.kernels import routing
from daedal.ops.backends.triton.launch import block_of, stretches, tuned
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY

_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
_COLUMNS = 1024
_MOST_ROWS = 128  # of a block

_GATE_UP = tuned(kernels.gate_up, spaces.EXPERTS, ["num_summed", "width", "BM"])
_DOWN = tuned(kernels.down, spaces.EXPERTS, ["num_columns", "width", "BM"])


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
    x_TD = rows(x_TD)
    (num_tokens, num_columns), active = x_TD.shape, ids_TA.shape[1]
    y_TD = x_TD.new_empty((num_tokens, num_columns))
    if not y_TD.numel() or not active:
        return y_TD.zero_()
    num_experts, _, width = down_EDF.shape
    ids_TA, choice_TA = ids_TA.sort(dim=-1, stable=True)  # a token's sum goes by the experts' numbers
    weights_TA = weights_TA.gather(-1, choice_TA)
    order_N = ids_TA.flatten().argsort(stable=True)
    block = min(_MOST_ROWS, block_of(-(-order_N.shape[0] // num_experts)))
    tiles = _tiles(ids_TA.flatten()[order_N], num_experts, block)
    hidden_NF = x_TD.new_empty((order_N.shape[0], width))
    result_ND = x_TD.new_empty((order_N.shape[0], num_columns), dtype=torch.float32)  # summed before it is rounded
    _GATE_UP[lambda meta: (tiles.shape[0], triton.cdiv(width, meta["BN"]))](
        x_TD, order_N // active, tiles, gate_up_EFD.contiguous(), hidden_NF, num_columns, width, x_TD.stride(0),
        float(limit or 0.0), LIMITED=limit is not None, BM=block,
    )  # fmt: skip
    _DOWN[lambda meta: (tiles.shape[0], triton.cdiv(num_columns, meta["BN"]))](
        hidden_NF, tiles, down_EDF.contiguous(), result_ND, width, num_columns, BM=block
    )
    places_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=x_TD.device))
    kernels.gather_sum[(num_tokens, triton.cdiv(num_columns, _COLUMNS))](
        result_ND, places_N, weights_TA, y_TD, num_columns, ACTIVE=active, BLOCK=_COLUMNS
    )
    return y_TD


def _tiles(sorted_N: Tensor, num_experts: int, block: int) -> Tensor:
    """As kernels read it, [n, 3] int32: n is the most that so many rows can need, as their number is not known here."""
    most = sorted_N.shape[0] // block + min(num_experts, sorted_N.shape[0])
    ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    blocks_E = (counts_E + block - 1) // block
    last_E = blocks_E.cumsum(0)
    tiles_n = torch.arange(most, device=sorted_N.device)
    expert_n = torch.searchsorted(last_E, tiles_n, right=True)
    known_n = expert_n.clamp(max=num_experts - 1)
    first_n = ends_E[known_n] - counts_E[known_n] + (tiles_n - last_E[known_n] + blocks_E[known_n]) * block
    expert_n = torch.where(expert_n < num_experts, expert_n, -1)
    return torch.stack((expert_n, first_n, ends_E[known_n]), 1).to(torch.int32)
