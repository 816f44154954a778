"""Next-token loss without a matrix of all logits: the vocabulary is passed over in chunks, forwards and backwards.

What is kept for the backward pass are the hidden states and one number per token; each chunk's logits are computed
again from them. The head and the softmax run in float32 whatever the states' dtype. Knows nothing of models.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.errors import ConfigError
from daedal.train.batches import IGNORED


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, chunk: int = 8192) -> Tensor:
    """The sum over tokens of -log p(target), in float32 (float64 stays); tokens whose target is IGNORED add nothing.

    hidden_TD: normed states. head_VD: the output matrix, of any floating dtype. targets_T: int64. chunk: entries of the
    vocabulary that are held at once; the result does not depend on it but for rounding.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}: it counts entries of the vocabulary, give at least 1")
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, head_VD, targets_T, chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        kept_t = (targets_T != IGNORED).nonzero().squeeze(-1)
        states_tD, wanted_t = hidden_TD[kept_t].to(wide), targets_T[kept_t]
        log_total_t = states_tD.new_full(wanted_t.shape, float("-inf"))
        target_t = states_tD.new_zeros(wanted_t.shape)
        for first in range(0, head_VD.shape[0], chunk):
            logits_tv = states_tD @ head_VD[first : first + chunk].to(wide).T
            log_total_t = torch.logaddexp(log_total_t, logits_tv.logsumexp(-1))
            place_t, inside_t = _inside(wanted_t, first, logits_tv.shape[1])
            target_t += logits_tv.gather(1, place_t[:, None]).squeeze(1) * inside_t
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, kept_t, log_total_t)
        ctx.chunk = chunk
        return (log_total_t - target_t).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TD, head_VD, targets_T, kept_t, log_total_t = ctx.saved_tensors
        states_tD, wanted_t = hidden_TD[kept_t].to(log_total_t.dtype), targets_T[kept_t]
        grad_tD = torch.zeros_like(states_tD)
        grad_VD = torch.empty_like(head_VD)
        for first in range(0, head_VD.shape[0], ctx.chunk):
            rows_vD = head_VD[first : first + ctx.chunk].to(log_total_t.dtype)
            surplus_tv = (states_tD @ rows_vD.T).sub_(log_total_t[:, None]).exp_()
            place_t, inside_t = _inside(wanted_t, first, rows_vD.shape[0])
            surplus_tv.scatter_add_(1, place_t[:, None], -inside_t[:, None].to(surplus_tv.dtype))
            surplus_tv *= grad
            grad_tD += surplus_tv @ rows_vD
            grad_VD[first : first + ctx.chunk] = surplus_tv.T @ states_tD
        grad_TD = torch.zeros_like(hidden_TD).index_copy_(0, kept_t, grad_tD.to(hidden_TD.dtype))
        return grad_TD, grad_VD, None, None


def _inside(wanted_t: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a chunk of `count`, and whether it is in it at all."""
    place_t = wanted_t - first
    inside_t = (place_t >= 0) & (place_t < count)
    return place_t.clamp(0, count - 1), inside_t
