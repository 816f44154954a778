"""Multi-token prediction modules: one more layer that guesses the token after the next (V3, section 2.2; V4, 2.1).

A module takes what the backbone carries at a position and the embedding of the token that follows it. Embedding and
head are the backbone's, passed in by `Transformer`. Its states have the form of the backbone's, so a module can be fed
its own and draft further.
"""

import torch
from torch import Tensor

from daedal.config import ModelConfig
from daedal.model.forward_pass import ForwardPass
from daedal.model.hyper_connections import HyperHead
from daedal.model.layers import HyperLayer, Layer
from daedal.model.linear import Linear
from daedal.model.norm import RMSNorm


class Draft(Layer):
    """V3's module: normed hidden_TD and the next tokens' embeddings to normed hidden_TD."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.norm = RMSNorm(hidden, eps)

    def propose(self, states_TD: Tensor, embedded_TD: Tensor, step: ForwardPass) -> Tensor:
        x_TD = self.eh_proj(torch.cat((self.enorm(embedded_TD), self.hnorm(states_TD)), -1))
        hidden_TD: Tensor = self.norm(self(x_TD, step))
        return hidden_TD

    def finish(self, states_TD: Tensor) -> Tensor:
        """What the head reads."""
        return states_TD


class HyperDraft(HyperLayer):
    """V4's module: streams_TMD and the next tokens' embeddings to streams_TMD."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.e_proj = Linear(hidden, hidden, bias=False)
        self.h_proj = Linear(hidden, hidden, bias=False)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(hidden, eps)

    def propose(self, states_TMD: Tensor, embedded_TD: Tensor, step: ForwardPass) -> Tensor:
        embedded_T1D = self.e_proj(self.enorm(embedded_TD)).unsqueeze(1)
        carried = self.h_proj(self.hnorm(states_TMD.flatten(0, 1))).view_as(states_TMD)
        streams_TMD: Tensor = self(embedded_T1D + carried, step)
        return streams_TMD

    def finish(self, states_TMD: Tensor) -> Tensor:
        """What the head reads: hidden_TD, normed."""
        hidden_TD: Tensor = self.norm(self.hc_head(states_TMD))
        return hidden_TD
