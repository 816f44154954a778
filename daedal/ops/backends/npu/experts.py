"""Routing and experts on the vendor's ops: rows by expert, two grouped products, and the sum of each token's experts.

Counts of rows stay on the device, so a step waits for nobody. The sum is taken here and not by the vendor's op, which
promises neither float32 nor an order.
"""

import torch
from torch import Tensor

from daedal.ops import reference
from daedal.ops.backends.npu import supports, vendor
from daedal.ops.backends.npu.elementwise import gated
from daedal.ops.backends.npu.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.trained import wants_gradients


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
    grouped = method != "greedy" and topk_group < n_group
    weights_TA, ids_TA = vendor.gating_top_k(
        logits_TE.detach(),
        bias_E,
        count=num_active,
        groups=n_group if grouped else 1,
        kept=topk_group if grouped else 1,
        by_best_two=method == "noaux_tc",
        sigmoid=scoring == "sigmoid",
        scale=scale,
    )
    if not wants_gradients(logits_TE):
        return ids_TA.long(), weights_TA
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
        given_TA=ids_TA.long(),
    )


@REGISTRY.register("experts", BACKEND, supports=supports.experts)
def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, *, limit: float | None
) -> Tensor:
    ids_TA, weights_TA = by_expert(ids_TA, weights_TA)
    rows_ND, places_N, counts_E, _ = vendor.init_routing(
        x_TD.contiguous(), ids_TA, gate_up_EFD.shape[0], quantised=False
    )
    gate_up_NF = vendor.grouped_matmul(rows_ND, gate_up_EFD.transpose(1, 2), counts_E)
    result_ND = vendor.grouped_matmul(gated(gate_up_NF, limit), down_EDF.transpose(1, 2), counts_E)
    return summed(result_ND, places_N, weights_TA)


def by_expert(ids_TA: Tensor, weights_TA: Tensor) -> tuple[Tensor, Tensor]:
    """A token's choices in ascending order of their experts, ids as int32: its sum goes by the experts' numbers."""
    ascending_TA, order_TA = ids_TA.sort(dim=-1, stable=True)
    return ascending_TA.to(torch.int32), weights_TA.gather(-1, order_TA)


def summed(rows_ND: Tensor, places_N: Tensor, weights_TA: Tensor) -> Tensor:
    """[T, D]: each token's rows by weight, in float32, rounded once."""
    apart_TAD = rows_ND.index_select(0, places_N).unflatten(0, weights_TA.shape)
    total_TD: Tensor = (apart_TAD.float() * weights_TA.float().unsqueeze(-1)).sum(1)
    return total_TD.to(rows_ND.dtype)
