"""Grouped-query attention of the Llama family: SmolLM2 and Llama 3, Qwen2 with biases, Qwen3 with normed heads.

The cache, when there is one, holds keys already rotated. The layer owns no serving state.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.forward_pass import ForwardPass
from daedal.model.linear import Linear
from daedal.model.norm import RMSNorm


class DenseAttention(nn.Module):
    """x_TD to y_TD. `layer` is the layer's index, by which it names its cache slots."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        normed = config.model_type == "qwen3"
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else None

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        # One rotation for queries and keys: they share positions, and a decode step is bound by launches.
        heads = q_THK.shape[1]
        rotated = ops.rotary(torch.cat((q_THK, k_TGK), 1), *step.turn(), interleaved=False)
        q_THK, k_TGK = rotated[:, :heads], rotated[:, heads:]
        rows = step.cache.extend(self.layer, key=k_TGK, value=v_TGK)
        o_THK = ops.attention(q_THK, step.batch.starts, rows["key"], rows["value"], scale=self.scale)
        y_TD: Tensor = self.o_proj(o_THK.flatten(1))
        return y_TD
