"""Next-token loss without a matrix of all logits: tokens go in chunks, and each chunk leaves its gradients behind.

The gradient of a token's loss needs its own logits alone, so it is made while they are there: nothing is computed
twice, and what is kept are gradients of the states and of the head. Logits and softmax are float32. Where states are
bfloat16 so are the factors of the products, which is what serving multiplies once the head is saved in bfloat16; a
chunk's gradients then come out in bfloat16, as those of every other matrix do, and chunks add up in float32. Knows
nothing of models.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.errors import ConfigError
from daedal.ops.narrow_factors import narrow_factors
from daedal.ops.softmaxes import target_surplus
from daedal.train.batches import IGNORED


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, chunk: int = 256) -> Tensor:
    """The sum over tokens of -log p(target), in float32 (float64 stays); tokens whose target is IGNORED add nothing.

    hidden_TD: normed states. head_VD: the output matrix, of any floating dtype. targets_T: int64. chunk: tokens whose
    logits are held at once; the result does not depend on it but for rounding.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}: it counts tokens whose logits are held at once, give at least 1")
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, head_VD, targets_T, chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        narrow = hidden_TD.dtype == torch.bfloat16
        factor = torch.bfloat16 if narrow else wide
        kept_t = (targets_T != IGNORED).nonzero().squeeze(-1)
        states_tD, wanted_t, head = hidden_TD[kept_t].to(factor), targets_T[kept_t], head_VD.to(factor)
        wide_VD = head_VD.to(wide)
        learns_states, learns_head = ctx.needs_input_grad[:2]
        grad_tD = torch.zeros_like(states_tD) if learns_states else None
        grad_VD = torch.zeros_like(wide_VD) if learns_head else None
        loss = states_tD.new_zeros((), dtype=wide)
        for first in range(0, states_tD.shape[0], chunk):
            places = slice(first, first + chunk)
            with narrow_factors(hidden_TD.device) if narrow else nullcontext():
                logits_tV = states_tD[places].to(wide) @ wide_VD.T
            nats_t, surplus_tV = target_surplus(logits_tV, wanted_t[places], factor)
            loss += nats_t.sum()
            if grad_tD is not None:
                grad_tD[places] = surplus_tV @ head
            if grad_VD is not None:
                grad_VD += surplus_tV.T @ states_tD[places]
        grad_TD = None
        if grad_tD is not None:
            grad_TD = torch.zeros_like(hidden_TD).index_copy_(0, kept_t, grad_tD.to(hidden_TD.dtype))
        ctx.save_for_backward(grad_TD, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In the loss's dtype: one over the targets, rounded to bfloat16, would scale every gradient by up to 0.4 %.
        scaled = (None if kept is None else (kept.to(grad.dtype) * grad).to(kept.dtype) for kept in ctx.saved_tensors)
        grad_TD, grad_VD = scaled
        return grad_TD, grad_VD, None, None
