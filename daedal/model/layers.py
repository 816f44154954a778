"""A layer of each family: attention and feed-forward around one residual stream, or around several."""

from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.attention_compressed import CompressedAttention
from daedal.model.attention_dense import DenseAttention
from daedal.model.attention_latent import LatentAttention
from daedal.model.attention_sparse import IndexedAttention
from daedal.model.forward_pass import ForwardPass
from daedal.model.hyper_connections import HyperConnection
from daedal.model.moe import GatedMLP, MoE
from daedal.model.norm import RMSNorm


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normed input and added to it: x_TD to x_TD."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), step)
        normed_TD = self.post_attention_layernorm(x_TD)
        y_TD: Tensor = self.mlp(normed_TD, step) if isinstance(self.mlp, MoE) else self.mlp(normed_TD)
        return x_TD + y_TD


class HyperLayer(nn.Module):
    """The same around M residual streams (V4): streams_TMD to streams_TMD."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_hc = HyperConnection(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.ffn_hc = HyperConnection(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer, hashed=config.mlp_kind(layer) == "hash")

    def forward(self, streams_TMD: Tensor, step: ForwardPass) -> Tensor:
        x_TD, post_TM, comb_TMM = self.attn_hc(streams_TMD)
        y_TD = self.self_attn(self.input_layernorm(x_TD), step)
        streams_TMD = ops.hyper_expand(y_TD, streams_TMD, post_TM, comb_TMM)
        x_TD, post_TM, comb_TMM = self.ffn_hc(streams_TMD)
        y_TD = self.mlp(self.post_attention_layernorm(x_TD), step)
        return ops.hyper_expand(y_TD, streams_TMD, post_TM, comb_TMM)


def attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention that the configuration names for this layer."""
    kind = config.attention_kind(layer)
    if config.is_compressed:
        return CompressedAttention(config, layer)
    if kind == "indexed_attention":
        return IndexedAttention(config, layer)
    return LatentAttention(config, layer) if kind == "latent_attention" else DenseAttention(config, layer)


def feed_forward(config: ModelConfig, layer: int) -> GatedMLP | MoE:
    """The feed-forward part that the configuration names for this layer."""
    if config.mlp_kind(layer) == "dense":
        return GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    return MoE(config, layer)
