"""RMS normalisation as a module: one weight per channel, no bias."""

import torch
from torch import Tensor, nn

from daedal import ops


class RMSNorm(nn.Module):
    """[..., dim] to the same shape and dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight, self.eps)
