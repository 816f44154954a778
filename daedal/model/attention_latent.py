"""Multi-head latent attention (MLA) of V2 and V3: keys and values of all heads live in one small latent per token.

The cache stores one row per token, the normalised latent and the rotated key part that all heads share (V2, section
2.1.2 and 2.1.3). Two forms give the same result. *Naive*: expand the latents into keys and values of every head, then
ordinary attention; cheap when many queries share the expansion, as in prefill and training. *Absorbed*: fold the key
expansion into the query and the value expansion into the output, and attend on the latents themselves as one shared
head; cheap when few queries meet a long past, as in decode. Each sequence takes the form that costs fewer operations,
by its own counts alone, so its result does not depend on what shares the batch.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.batch import CacheView, RaggedBatch
from daedal.model.linear import Linear
from daedal.model.norm import RMSNorm
from daedal.ops.rows import FlatRows, Rows

LATENT_NORM_EPS = 1e-6  # the latents' norms keep this value in every release, whatever rms_norm_eps says


class LatentAttention(nn.Module):
    """x_TD to y_TD. `layer` is the layer's index, by which it names its cache slot."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None
        assert config.v_head_dim is not None
        self.layer = layer
        self.interleaved = config.rope_interleave
        self.num_heads = config.num_attention_heads
        self.latent, self.nope, self.rope = config.kv_lora_rank, config.qk_nope_head_dim, config.rope_dim
        self.value = config.v_head_dim
        self.scale = config.head_dim**-0.5 * config.rope_parameters.length_scale()
        hidden, queries, bias = config.hidden_size, self.num_heads * config.head_dim, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries, bias=False)
        self.has_query_latent = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.num_heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.num_heads * self.value, hidden, bias=bias)

    def forward(self, x_TD: Tensor, batch: RaggedBatch, turn: tuple[Tensor, Tensor], cache: CacheView | None) -> Tensor:
        q_TD = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))) if self.has_query_latent else self.q_proj(x_TD)
        q_THN, q_THR = q_TD.unflatten(-1, (self.num_heads, -1)).split((self.nope, self.rope), -1)
        latent_TL, k_TR = self.kv_a_proj_with_mqa(x_TD).split((self.latent, self.rope), -1)
        # One rotation for the queries of all heads and the key part that they share.
        rotated = ops.rotary(torch.cat((q_THR, k_TR.unsqueeze(1)), 1), *turn, interleaved=self.interleaved)
        q_THR, k_TR = rotated[:, : self.num_heads], rotated[:, self.num_heads]
        row_TC = torch.cat((self.kv_a_layernorm(latent_TL), k_TR), -1)
        rows: Rows = FlatRows(row_TC, batch.starts)
        if cache is not None:
            cache.append(self.layer, latent=row_TC)
            rows = cache.read(self.layer)["latent"]
        y_TD: Tensor = self.o_proj(self._attend(q_THN, q_THR, batch, rows).flatten(1))
        return y_TD

    def absorbs(self, num_new: int, num_keys: int) -> bool:
        """Whether the absorbed form needs fewer multiplications for `num_new` queries on `num_keys` keys."""
        expansion = self.latent * (self.nope + self.value)
        naive = num_keys * expansion + num_new * num_keys * (self.nope + self.rope + self.value)
        absorbed = num_new * expansion + num_new * num_keys * (2 * self.latent + self.rope)
        return absorbed < naive

    def _attend(self, q_THN: Tensor, q_THR: Tensor, batch: RaggedBatch, rows: Rows) -> Tensor:
        """[T, H, V]: each sequence in its own form; sequences of one form go together."""
        absorbed = [self.absorbs(count, past + count) for past, count in zip(batch.pasts, batch.counts, strict=True)]
        if all(absorbed):
            return self.absorbed(q_THN, q_THR, batch.starts, rows)
        if not any(absorbed):
            return self.naive(q_THN, q_THR, batch.starts, rows)
        o_THV = q_THN.new_empty(q_THN.shape[0], self.num_heads, self.value)
        for form, wanted in ((self.absorbed, True), (self.naive, False)):
            chosen = [index for index, absorbs in enumerate(absorbed) if absorbs is wanted]
            spans = [range(batch.starts[index], batch.starts[index + 1]) for index in chosen]
            tokens_t = torch.tensor([token for span in spans for token in span], device=q_THN.device)
            starts = [0]
            for span in spans:
                starts.append(starts[-1] + len(span))
            part = form(q_THN[tokens_t], q_THR[tokens_t], tuple(starts), rows.select(chosen))
            o_THV = o_THV.index_copy(0, tokens_t, part)
        return o_THV

    def naive(self, q_THN: Tensor, q_THR: Tensor, starts: tuple[int, ...], rows: Rows) -> Tensor:
        """Expands every latent row into the keys and values of all heads (V2, equations 9 to 15)."""
        flat = rows.flatten()
        latent_SL, k_SR = flat.rows.split((self.latent, self.rope), -1)
        expanded_SHC = self.kv_b_proj(latent_SL).unflatten(-1, (self.num_heads, -1))
        k_SHN, v_SHV = expanded_SHC.split((self.nope, self.value), -1)
        k_SHK = torch.cat((k_SHN, k_SR.unsqueeze(1).expand(-1, self.num_heads, -1)), -1)
        q_THK = torch.cat((q_THN, q_THR), -1)
        keys, values = FlatRows(k_SHK, flat.starts), FlatRows(v_SHV, flat.starts)
        return ops.attention(q_THK, starts, keys, values, scale=self.scale)

    def absorbed(self, q_THN: Tensor, q_THR: Tensor, starts: tuple[int, ...], rows: Rows) -> Tensor:
        """Attends on the latent rows as one key head that is its own value (V2, section 2.1.2, last paragraph)."""
        expansion_HCL = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        keys_HNL, values_HVL = expansion_HCL.split((self.nope, self.value), 1)
        q_THL = torch.matmul(q_THN.transpose(0, 1), keys_HNL).transpose(0, 1)
        q_THC = torch.cat((q_THL, q_THR), -1)
        o_THL = ops.attention(q_THC, starts, rows, self.latent, scale=self.scale)
        # Weights on the left: on the right they would be copied first, being a slice of the expansion.
        return torch.matmul(values_HVL, o_THL.permute(1, 2, 0)).permute(2, 0, 1)
