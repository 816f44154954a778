"""The model as one MindSpore cell: token ids and their positions to hidden states, over a static cache; then logits.

Parameters are named as `daedal.shapes` names them, but for the key-value expansions (`attention`), the caches and the
tables of angles. Knows nothing of files or of text.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, lazy_inline, nn, ops

from daedal.config import ModelConfig
from daedal.ports.mindspore.attention import DenseAttention, LatentAttention
from daedal.ports.mindspore.feed_forward import GatedMLP, MoE
from daedal.ports.mindspore.pieces import RMSNorm, linear, parameter
from daedal.ports.mindspore.rotary import tables

_HIDDEN = -1e30  # added to the score of a position that a token may not see


class Layer(nn.Cell):
    """Attention, then feed-forward of one kind, "dense" or "sparse", each on the normed input and added to it.

    Layers made with equal arguments are compiled once: MindSpore keeps the graph of the first under what its arguments
    look like, and gives each of the others a copy with parameters of its own. So a layer is not told its number.
    """

    @lazy_inline(policy="front")
    def __init__(self, config: ModelConfig, kind: str, slots: int, dtype: Any):
        super().__init__()
        attention = LatentAttention if config.is_latent else DenseAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = attention(config, slots, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if kind == "dense":
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, bias=config.mlp_bias)
        else:
            self.mlp = MoE(config, dtype)

    def construct(self, x_TD: Any, positions_T: Any, cos_TC: Any, sin_TC: Any, bias_TS: Any) -> Any:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions_T, cos_TC, sin_TC, bias_TS)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Embedding(nn.Cell):
    """ids_T to x_TD."""

    def __init__(self, vocabulary: int, hidden: int, dtype: Any):
        super().__init__()
        self.weight = parameter((vocabulary, hidden), dtype)

    def construct(self, ids_T: Any) -> Any:
        return ops.gather(self.weight, ids_T, 0)


class Network(nn.Cell):
    """One sequence's next tokens: ids_T at positions_T, both int32, to hidden_TD, normed, which `head` reads.

    slots: positions that the cache has. dtype: of weights, activations and cache, a MindSpore type.
    """

    def __init__(self, config: ModelConfig, *, slots: int, dtype: Any):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        kinds = [config.mlp_kind(layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.CellList([Layer(config, kind, slots, dtype) for kind in kinds])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = linear(config.hidden_size, config.vocab_size, dtype)
        cos_SC, sin_SC = tables(config.rope_parameters, config.rope_dim, slots)
        self.cos_SC = Parameter(Tensor(cos_SC), requires_grad=False)
        self.sin_SC = Parameter(Tensor(sin_SC), requires_grad=False)
        self.slots_1S = Tensor(np.arange(slots, dtype=np.int32)[None, :])
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, ids_T: Any, positions_T: Any) -> Any:
        cos_TC, sin_TC = ops.gather(self.cos_SC, positions_T, 0), ops.gather(self.sin_SC, positions_T, 0)
        bias_TS = (self.slots_1S > positions_T.expand_dims(1)).astype(ms.float32) * _HIDDEN
        x_TD = self.embed_tokens(ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, positions_T, cos_TC, sin_TC, bias_TS)
        return self.norm(x_TD)

    def head(self, hidden_TD: Any) -> Any:
        """logits_TV in float32, never rounded to fewer bits in between."""
        weight_VD = self.embed_tokens.weight if self.tied else self.lm_head.weight
        return self.product(hidden_TD.astype(ms.float32), weight_VD.astype(ms.float32))
