"""The two kinds of attention as MindSpore cells: grouped heads (Llama, Qwen), and latent (V2, section 2.1; V3).

Names of parameters are those of `daedal.shapes`. Latent attention has the absorbed form alone, on cached latents: with
a static cache and short chunks it needs fewer operations than expanding every row. Its key-value expansion is therefore
held in two parts, keys [H, N, L] and values [H, V, L].
"""

from typing import Any

from mindspore import nn, ops

from daedal.config import ModelConfig
from daedal.ports.mindspore.pieces import Attention, RMSNorm, Rotation, Rows, linear, parameter

LATENT_NORM_EPS = 1e-6  # of the latents' norms in every release, whatever rms_norm_eps says


class DenseAttention(nn.Cell):
    """x_TD to y_TD; biases in Qwen2, normed heads in Qwen3."""

    def __init__(self, config: ModelConfig, slots: int, dtype: Any):
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, queries, keys = config.hidden_size, self.heads * self.dim, self.groups * self.dim
        self.q_proj = linear(hidden, queries, dtype, bias=config.qkv_bias)
        self.k_proj = linear(hidden, keys, dtype, bias=config.qkv_bias)
        self.v_proj = linear(hidden, keys, dtype, bias=config.qkv_bias)
        self.o_proj = linear(queries, hidden, dtype, bias=config.output_bias)
        self.normed = config.model_type == "qwen3"
        if self.normed:
            self.q_norm = RMSNorm(self.dim, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps, dtype)
        self.turn = Rotation(interleaved=False)
        self.cache_key = Rows(self.groups, slots, self.dim, dtype)
        self.cache_value = Rows(self.groups, slots, self.dim, dtype)
        self.attend = Attention(self.dim**-0.5)

    def construct(self, x_TD: Any, positions_T: Any, cos_TC: Any, sin_TC: Any, bias_TS: Any) -> Any:
        tokens = x_TD.shape[0]
        q_THK = self.q_proj(x_TD).reshape(tokens, self.heads, self.dim)
        k_TGK = self.k_proj(x_TD).reshape(tokens, self.groups, self.dim)
        v_TGK = self.v_proj(x_TD).reshape(tokens, self.groups, self.dim)
        if self.normed:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        q_THK, k_TGK = self.turn(q_THK, cos_TC, sin_TC), self.turn(k_TGK, cos_TC, sin_TC)
        keys_GSK, values_GSK = self.cache_key(k_TGK, positions_T), self.cache_value(v_TGK, positions_T)
        o_THK = self.attend(q_THK, keys_GSK, values_GSK, bias_TS)
        return self.o_proj(o_THK.reshape(tokens, self.heads * self.dim))


class Expansion(nn.Cell):
    """The key-value expansion by head, for the absorbed form: into the query, and out of attended latents."""

    def __init__(self, heads: int, nope: int, value: int, latent: int, dtype: Any):
        super().__init__()
        self.keys = parameter((heads, nope, latent), dtype)
        self.values = parameter((heads, value, latent), dtype)
        self.into = ops.BatchMatMul()
        self.out = ops.BatchMatMul(transpose_b=True)

    def fold(self, q_THN: Any) -> Any:
        """q_THL."""
        return self.into(q_THN.swapaxes(0, 1), self.keys).swapaxes(0, 1)

    def unfold(self, o_THL: Any) -> Any:
        """o_THV."""
        return self.out(o_THL.swapaxes(0, 1), self.values).swapaxes(0, 1)


class LatentAttention(nn.Cell):
    """x_TD to y_TD; the cache has one row per token, the normed latent and the rotated key part of all heads."""

    def __init__(self, config: ModelConfig, slots: int, dtype: Any):
        super().__init__()
        assert config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None
        assert config.v_head_dim is not None
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.heads, self.latent, self.nope = heads, config.kv_lora_rank, config.qk_nope_head_dim
        self.rope, self.value, self.dim = config.rope_dim, config.v_head_dim, config.head_dim
        self.has_query_latent = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, heads * self.dim, dtype)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank, dtype, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype)
            self.q_b_proj = linear(config.q_lora_rank, heads * self.dim, dtype)
        self.kv_a_proj_with_mqa = linear(hidden, self.latent + self.rope, dtype, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Expansion(heads, self.nope, self.value, self.latent, dtype)
        self.o_proj = linear(heads * self.value, hidden, dtype, bias=bias)
        self.turn = Rotation(interleaved=config.rope_interleave)
        self.cache_latent = Rows(1, slots, self.latent + self.rope, dtype)
        self.attend = Attention(self.dim**-0.5 * config.rope_parameters.length_scale())

    def construct(self, x_TD: Any, positions_T: Any, cos_TC: Any, sin_TC: Any, bias_TS: Any) -> Any:
        tokens = x_TD.shape[0]
        q_TD = self.latent_query(x_TD) if self.has_query_latent else self.q_proj(x_TD)
        q_THK = q_TD.reshape(tokens, self.heads, self.dim)
        row_TC = self.kv_a_proj_with_mqa(x_TD)
        latent_T1L = self.kv_a_layernorm(row_TC[:, : self.latent]).expand_dims(1)
        q_THR = self.turn(q_THK[:, :, self.nope :], cos_TC, sin_TC)
        k_T1R = self.turn(row_TC[:, self.latent :].expand_dims(1), cos_TC, sin_TC)
        rows_1SC = self.cache_latent(ops.cat((latent_T1L, k_T1R), -1), positions_T)
        q_THC = ops.cat((self.kv_b_proj.fold(q_THK[:, :, : self.nope]), q_THR), -1)
        # Rows are their own values; cutting the result is cheaper than cutting the cache.
        o_THL = self.attend(q_THC, rows_1SC, rows_1SC, bias_TS)[:, :, : self.latent]
        return self.o_proj(self.kv_b_proj.unfold(o_THL).reshape(tokens, self.heads * self.value))

    def latent_query(self, x_TD: Any) -> Any:
        """The queries of all heads through their own latent."""
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
