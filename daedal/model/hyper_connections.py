"""Manifold-constrained hyper-connections (mHC; V4, section 2.2): M residual streams instead of one.

Before each block the streams are collapsed into its input, after it they are mixed by a doubly stochastic matrix and
the block's output is added to each. All weights depend on the token and are computed in float32.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig


class HyperConnection(nn.Module):
    """streams_TMD to a block's input x_TD, and the weights with which its output returns: post_TM, comb_TMM."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.hc_mult is not None
        assert config.hc_sinkhorn_iters is not None
        streams = config.hc_mult
        mixes = streams * (2 + streams)
        self.norm_eps, self.eps, self.iterations = config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters
        self.fn = nn.Parameter(torch.empty(mixes, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(mixes))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, streams_TMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.hyper_collapse(
            streams_TMD,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.norm_eps,
            eps=self.eps,
            iterations=self.iterations,
        )


class HyperHead(nn.Module):
    """streams_TMD to x_TD, at the end."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.hc_mult is not None
        self.norm_eps, self.eps = config.rms_norm_eps, config.hc_eps
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams_TMD: Tensor) -> Tensor:
        return ops.hyper_head(
            streams_TMD, self.hc_fn, self.hc_base, self.hc_scale, norm_eps=self.norm_eps, eps=self.eps
        )
