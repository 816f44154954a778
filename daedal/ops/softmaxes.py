"""Softmaxes of training, on native kernels where there are any for what is given, else on PyTorch's own.

All compute in float32 (`target_surplus` also in float64, which is PyTorch's alone). Kernels go over memory once where
PyTorch's go four to six times, and leave out products that no query sees. Knows no rows and no models.
"""

import torch
from torch import Tensor

from daedal.ops.backends.cpu import gradients
from daedal.ops.narrow_factors import narrow_factors


def causal_shares(q_NtK: Tensor, k_NtK: Tensor, scale: float) -> Tensor:
    """shares_Ntt in bfloat16, as q and k are: row i is the softmax of the query's products with its first i + 1 keys,
    times `scale`, and 0 behind them.
    """
    if gradients.kernels_run(q_NtK) and gradients.causal_declines(q_NtK, k_NtK) is None:
        return gradients.causal_shares(q_NtK, k_NtK, scale)
    length = q_NtK.shape[1]
    hidden_tt = torch.full((length, length), float("-inf"), device=q_NtK.device).triu_(1)
    with narrow_factors(q_NtK.device):
        scores_Ntt = torch.bmm(q_NtK.float(), k_NtK.float().mT)
    return scores_Ntt.mul_(scale).add_(hidden_tt).softmax(-1, dtype=torch.float32).to(q_NtK.dtype)


def causal_gradients(push_NtV: Tensor, v_NtV: Tensor, shares_Ntt: Tensor, scale: float) -> Tensor:
    """Gradients of those products, in bfloat16. push_NtV: of the values weighted by the shares."""
    if gradients.kernels_run(push_NtV) and gradients.causal_declines(push_NtV, v_NtV) is None:
        return gradients.causal_gradients(push_NtV, v_NtV, shares_Ntt, scale)
    with narrow_factors(v_NtV.device):
        wanted_Ntt = torch.bmm(push_NtV.float(), v_NtV.float().mT)
    softened_Ntt = torch._softmax_backward_data(wanted_Ntt, shares_Ntt.float(), -1, torch.float32)
    return softened_Ntt.mul_(scale).to(shares_Ntt.dtype)


def target_surplus(logits_tV: Tensor, targets_t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(-log p(target) of each token, probabilities less one at the targets in `dtype`); overwrites the logits."""
    if gradients.kernels_run(logits_tV) and logits_tV.dtype == torch.float32 and logits_tV.is_contiguous():
        return gradients.target_surplus(logits_tV, targets_t, dtype)
    target_t1 = logits_tV.gather(1, targets_t[:, None])
    peak_t1 = logits_tV.amax(-1, keepdim=True)
    shares_tV = logits_tV.sub_(peak_t1).exp_()
    total_t1 = shares_tV.sum(-1, keepdim=True)
    nats_t1 = peak_t1 - target_t1 + total_t1.log()
    shares_tV.div_(total_t1)
    return nats_t1[:, 0], shares_tV.scatter_add_(1, targets_t[:, None], torch.full_like(target_t1, -1.0)).to(dtype)
