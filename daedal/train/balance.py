"""Keeping experts equally busy: loads, the bias update of auxiliary-loss-free balancing, and the sequence-wise loss.

A layer's load is how many tokens chose each expert, summed over everything that one optimiser step learns from: all
micro-batches, all processes, drafting modules included, evaluation and recomputation not. After the step each expert's
correction bias moves by a speed towards the mean load, whatever the distance (V3, section 2.1.2; V4, section 2.1). The
sequence-wise loss is the small complementary one of V3, equations 17 to 20.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from daedal.model.forward_pass import Routed
from daedal.model.moe import Router
from daedal.ops.reference import expert_scores

Loads = Mapping[int, Tensor]  # layer to int64 [E]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How evenly experts are used, over the MoE layers that choose by score.

    max_violation: the busiest expert's load over the mean, less one (MaxVio), the mean over layers and the worst layer.
    idle: experts that no token chose, over all layers.
    """

    max_violation: float
    worst_violation: float
    idle: int


def load_of(seen: Routed) -> Tensor:
    """int64 [E]: how many tokens of this forward pass chose each expert."""
    return torch.bincount(seen.ids_TA.flatten(), minlength=seen.logits_TE.shape[1])


def sequence_loss(seen: Routed) -> Tensor:
    """The sum over sequences of tokens x sum over experts of f P, to be divided by the tokens of the whole batch.

    f: E / A times the share of a sequence's tokens whose A best scores hold the expert. P: the mean of the expert's
    share in each token's scores. Gradients reach the router through P.
    """
    scores_TE = expert_scores(seen.logits_TE, seen.scoring)
    experts = scores_TE.shape[1]
    active = seen.ids_TA.shape[1]
    counts_B = torch.tensor(seen.batch.counts)
    sequence_T = torch.repeat_interleave(torch.arange(len(counts_B)), counts_B).to(scores_TE.device)
    best_TA = scores_TE.detach().topk(active, -1).indices
    chosen_TE = torch.zeros_like(scores_TE, requires_grad=False).scatter_(1, best_TA, 1.0)
    empty_BE = scores_TE.new_zeros(len(counts_B), experts)
    f_BE = empty_BE.index_add(0, sequence_T, chosen_TE) * (experts / active)
    p_BE = empty_BE.index_add(0, sequence_T, scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20))
    # Both are sums over a sequence's tokens here; one of the two divisions is the mean's own weight.
    loss: Tensor = ((f_BE * p_BE).sum(-1) / counts_B.to(f_BE).clamp_min(1)).sum()
    return loss


def routers(model: nn.Module) -> dict[int, Router]:
    """Layer to router, of drafting modules too, where experts are chosen by score."""
    return {module.layer: module for module in model.modules() if isinstance(module, Router) and module.tid2eid is None}


@torch.no_grad()
def update_biases(model: nn.Module, loads: Loads, *, speed: float) -> None:
    """Moves every correction bias by `speed` towards the mean load. loads: of the whole step, over all processes; empty
    where nothing is to be balanced, as while indexers alone learn.

    Raises KeyError for a layer that has a bias and no load, if others have one: it was not counted.
    """
    if not loads:
        return
    for layer, router in routers(model).items():
        if router.e_score_correction_bias is not None:
            load_E = loads[layer].to(router.e_score_correction_bias)
            router.e_score_correction_bias.add_(torch.sign(load_E.mean() - load_E), alpha=speed)


def balance(loads: Loads) -> Balance | None:
    """None without loads."""
    if not loads:
        return None
    violations = [float(load.max() / load.double().mean().clamp_min(1e-9)) - 1.0 for load in loads.values()]
    idle = sum(int((load == 0).sum()) for load in loads.values())
    return Balance(max_violation=sum(violations) / len(violations), worst_violation=max(violations), idle=idle)
