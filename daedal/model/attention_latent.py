"""Multi-head latent attention (MLA) of V2 and V3: keys and values of all heads live in one small latent per token.

The cache stores one row per token, the normalised latent and the rotated key part that all heads share (V2, section
2.1.2 and 2.1.3). Two forms give the same result. *Naive*: expand the latents into keys and values of every head, then
ordinary attention; cheap when many queries share the expansion, as in prefill and training. *Absorbed*: fold the key
expansion into the query and the value expansion into the output, and attend on the latents themselves as one shared
head; cheap when few queries meet a long past, as in decode. Each sequence takes the form that costs fewer operations,
by its own counts alone, so its result does not depend on what shares the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.forward_pass import ForwardPass, Indexed
from daedal.model.linear import Linear, like
from daedal.model.norm import RMSNorm
from daedal.ops.packed import Packed
from daedal.ops.rows import FlatRows, Rows
from daedal.packed import PANEL

LATENT_NORM_EPS = 1e-6  # the latents' norms keep this value in every release, whatever rms_norm_eps says


class Expansion(Linear):
    """Latents to the keys and values of all heads, and, for the absorbed form, its parts by head.

    weight: [H (N + V), L]. Packed, it is three stacks in its place: keys [H, N, L], values [H, V, L], and folded
    [H, L, N], the keys transposed.
    """

    keys: Packed | None = None
    values: Packed | None = None
    folded: Packed | None = None

    def __init__(self, latent: int, heads: int, nope: int, value: int):
        super().__init__(latent, heads * (nope + value), bias=False)
        self.heads, self.nope, self.value = heads, nope, value

    def expand(self, latent_SL: Tensor) -> tuple[Tensor, Tensor]:
        """k_SHN and v_SHV."""
        if self.keys is None or self.values is None:
            k_SHN, v_SHV = self(latent_SL).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), -1)
            return k_SHN, v_SHV
        return _all_heads(latent_SL, self.keys), _all_heads(latent_SL, self.values)

    def fold(self, q_THN: Tensor) -> Tensor:
        """q_THL: the key expansion taken into the query."""
        return ops.grouped_linear(q_THN, self.folded or self._parts(q_THN)[0].transpose(1, 2))

    def unfold(self, o_THL: Tensor) -> Tensor:
        """o_THV: values from attended latents."""
        return ops.grouped_linear(o_THL, self.values or self._parts(o_THL)[1])

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Per head, from the latent to its keys and to its values: [H, N, L] and [H, V, L], in x's dtype."""
        keys_HNL, values_HVL = like(self.weight, x).unflatten(0, (self.heads, -1)).split((self.nope, self.value), 1)
        return keys_HNL, values_HVL


def _all_heads(latent_SL: Tensor, stack: Packed) -> Tensor:
    """[S, H, N]: every latent through every matrix of a stack [H, N, L]."""
    if stack.rows % PANEL == 0:
        expanded_SHN: Tensor = ops.linear(latent_SL, stack.joined()).unflatten(-1, (stack.count, -1))
        return expanded_SHN
    return ops.grouped_linear(latent_SL.unsqueeze(1).expand(-1, stack.count, -1), stack)


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
        self.kv_b_proj = Expansion(self.latent, self.num_heads, self.nope, self.value)
        self.o_proj = Linear(self.num_heads * self.value, hidden, bias=bias)

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        query_TL = self.q_a_layernorm(self.q_a_proj(x_TD)) if self.has_query_latent else x_TD
        q_TD = self.q_b_proj(query_TL) if self.has_query_latent else self.q_proj(query_TL)
        q_THN, q_THR = q_TD.unflatten(-1, (self.num_heads, -1)).split((self.nope, self.rope), -1)
        latent_TL, k_TR = self.kv_a_proj_with_mqa(x_TD).split((self.latent, self.rope), -1)
        # One rotation for the queries of all heads and the key part that they share.
        rotated = ops.rotary(torch.cat((q_THR, k_TR.unsqueeze(1)), 1), *step.turn(), interleaved=self.interleaved)
        q_THR, k_TR = rotated[:, : self.num_heads], rotated[:, self.num_heads]
        row_TC = torch.cat((self.kv_a_layernorm(latent_TL), k_TR), -1)
        rows = step.cache.extend(self.layer, latent=row_TC)["latent"]
        chosen_TA, indexed = self.choose(x_TD, query_TL, step)
        part = Part(q_THN, q_THR, step.batch.starts, step.batch.pasts, rows, chosen_TA)
        self.show(part, indexed, step)
        y_TD: Tensor = self.o_proj(self._attend(part).flatten(1))
        return y_TD

    def choose(self, x_TD: Tensor, query_TL: Tensor, step: ForwardPass) -> tuple[Tensor | None, Indexed | None]:
        """Which rows each query reads, as `ops.choose_entries` says; None for all. And how they were scored."""
        return None, None

    def show(self, part: "Part", indexed: Indexed | None, step: ForwardPass) -> None:
        """To an observer, what an indexer is to learn from."""

    def reads_chosen(self, num_new: int, num_keys: int) -> bool:
        """Whether `num_new` queries on `num_keys` keys read only those that `choose` names."""
        return False

    def absorbs(self, num_new: int, num_keys: int) -> bool:
        """Whether the absorbed form needs fewer multiplications for `num_new` queries on `num_keys` keys."""
        expansion = self.latent * (self.nope + self.value)
        naive = num_keys * expansion + num_new * num_keys * (self.nope + self.rope + self.value)
        absorbed = num_new * expansion + num_new * num_keys * (2 * self.latent + self.rope)
        return absorbed < naive

    def _attend(self, part: "Part") -> Tensor:
        """[T, H, V]: each sequence in its own form; sequences of one form go together."""
        spans = zip(part.pasts, pairwise(part.starts), strict=True)
        forms = [self._form(past, end - start, part.chosen_TA is not None) for past, (start, end) in spans]
        kinds = dict.fromkeys(forms)
        if len(kinds) == 1:
            return forms[0](part)
        o_THV = part.q_THN.new_empty(part.q_THN.shape[0], self.num_heads, self.value)
        for form in kinds:
            tokens_t, some = part.select([index for index, wanted in enumerate(forms) if wanted == form])
            o_THV = o_THV.index_copy(0, tokens_t, form(some))
        return o_THV

    def _form(self, past: int, num_new: int, chosen: bool) -> Callable[["Part"], Tensor]:
        if chosen and self.reads_chosen(num_new, past + num_new):
            return self.sparse
        return self.absorbed if self.absorbs(num_new, past + num_new) else self.naive

    def naive(self, part: "Part") -> Tensor:
        """Expands every latent row into the keys and values of all heads (V2, equations 9 to 15)."""
        flat = part.rows.flatten()
        latent_SL, k_SR = flat.rows.split((self.latent, self.rope), -1)
        k_SHN, v_SHV = self.kv_b_proj.expand(latent_SL)
        k_SHK = torch.cat((k_SHN, k_SR.unsqueeze(1).expand(-1, self.num_heads, -1)), -1)
        q_THK = torch.cat((part.q_THN, part.q_THR), -1)
        keys, values = FlatRows(k_SHK, flat.starts), FlatRows(v_SHV, flat.starts)
        return ops.attention(q_THK, part.starts, keys, values, scale=self.scale)

    def absorbed(self, part: "Part") -> Tensor:
        """Attends on the latent rows as one key head that is its own value (V2, section 2.1.2, last paragraph)."""
        q_THC = self.fold_query(part)
        o_THL = ops.attention(q_THC, part.starts, part.rows, self.latent, scale=self.scale)
        return self.kv_b_proj.unfold(o_THL)

    def sparse(self, part: "Part") -> Tensor:
        """As `absorbed`, on the chosen rows alone (V3.2, section 2)."""
        o_THL = ops.sparse_attention(
            self.fold_query(part),
            part.starts,
            part.pasts,
            part.rows,
            part.chosen_TA,
            None,
            None,
            value_dim=self.latent,
            scale=self.scale,
            rate=1,
            span=0,
        )
        return self.kv_b_proj.unfold(o_THL)

    def fold_query(self, part: "Part") -> Tensor:
        """q_THC: queries on the latent rows themselves."""
        return torch.cat((self.kv_b_proj.fold(part.q_THN), part.q_THR), -1)


@dataclass(frozen=True, eq=False)
class Part:
    """Queries of some sequences, and the rows that they may read."""

    q_THN: Tensor
    q_THR: Tensor
    starts: tuple[int, ...]
    pasts: tuple[int, ...]
    rows: Rows
    chosen_TA: Tensor | None

    def select(self, indices: list[int]) -> "tuple[Tensor, Part]":
        """Some of the sequences, and which tokens are theirs."""
        spans = [range(self.starts[index], self.starts[index + 1]) for index in indices]
        tokens = [token for span in spans for token in span]  # none where these sequences bring nothing
        tokens_t = torch.tensor(tokens, dtype=torch.int64, device=self.q_THN.device)
        starts = tuple(accumulate((len(span) for span in spans), initial=0))
        pasts = tuple(self.pasts[index] for index in indices)
        chosen_tA = None if self.chosen_TA is None else self.chosen_TA[tokens_t]
        part = Part(self.q_THN[tokens_t], self.q_THR[tokens_t], starts, pasts, self.rows.select(indices), chosen_tA)
        return tokens_t, part
