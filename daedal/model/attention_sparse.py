"""DeepSeek Sparse Attention (DSA) of V3.2: latent attention that reads only the rows an indexer chooses.

The lightning indexer scores every past token with a few small heads and keeps the best `index_topk` (V3.2, section 2).
A prompt that is no longer than that reads everything, in whichever form of MLA is cheaper; a single new token always
reads what is chosen, so that a decode step is the same at every length. The published engine rotates the indexer's
queries and keys by a Hadamard matrix before FP8; dot products are the same without, as transformers computes them. The
indexer's own rotation covers the first numbers of each head, as halves and not as pairs: the one place where this model
line does so.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.attention_latent import LatentAttention, Part
from daedal.model.forward_pass import Attended, ForwardPass, Indexed
from daedal.model.linear import Linear, WideLinear

KEY_NORM_EPS = 1e-6


class KeyNorm(nn.Module):
    """Layer normalisation with weight and bias, in float32 inside: an RMS norm of what differs from the mean."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_TK: Tensor) -> Tensor:
        wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
        x_wide, dim = x_TK.to(wide), x_TK.shape[-1]
        mean_T1 = ops.linear(x_wide, torch.full((1, dim), 1 / dim, dtype=wide, device=x_TK.device))
        normed_TK = ops.rms_norm(x_wide - mean_T1, self.weight.to(wide), KEY_NORM_EPS)
        return (normed_TK + self.bias.to(wide)).to(x_TK.dtype)


class TokenIndexer(nn.Module):
    """Chooses rows for each query from x_TD and the query's latent."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.q_lora_rank is not None
        assert config.index_n_heads is not None
        assert config.index_head_dim is not None
        assert config.index_topk is not None
        self.layer = layer
        self.heads, self.dim, self.count = config.index_n_heads, config.index_head_dim, config.index_topk
        self.rope = config.rope_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.wk = Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = KeyNorm(self.dim)
        self.weights_proj = WideLinear(config.hidden_size, self.heads)

    def forward(self, x_TD: Tensor, query_TL: Tensor, step: ForwardPass) -> tuple[Tensor | None, Indexed]:
        """chosen_TA, None where all is to be read. A query that sees no more than `count` tokens chooses them all."""
        k_T1K = self._rotate(self.k_norm(self.wk(x_TD)).unsqueeze(1), step)
        keys = step.cache.extend(self.layer, index_key=k_T1K.squeeze(1))["index_key"]
        q_TIK = self._rotate(self.wq_b(query_TL).unflatten(-1, (self.heads, self.dim)), step)
        weights_TI = self.weights_proj(x_TD) * (self.heads * self.dim) ** -0.5
        indexed = Indexed(layer=self.layer, q_TIK=q_TIK, weights_TI=weights_TI, keys=keys, rate=1)
        return (None if step.reads_all else indexed.choose(step.batch, self.count)), indexed

    def _rotate(self, x_THK: Tensor, step: ForwardPass) -> Tensor:
        rotated, plain = x_THK.split((self.rope, self.dim - self.rope), -1)
        return torch.cat((ops.rotary(rotated, *step.turn(), interleaved=False), plain), -1)


class IndexedAttention(LatentAttention):
    """x_TD to y_TD: latent attention with an indexer of its own."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.indexer = TokenIndexer(config, layer)

    def choose(self, x_TD: Tensor, query_TL: Tensor, step: ForwardPass) -> tuple[Tensor | None, Indexed]:
        chosen: tuple[Tensor | None, Indexed] = self.indexer(x_TD.detach(), query_TL.detach(), step)
        return chosen

    def show(self, part: Part, indexed: Indexed | None, step: ForwardPass) -> None:
        if step.observer is None or indexed is None:
            return
        with torch.no_grad():
            q_THC = self.fold_query(part)
        attended = Attended(
            layer=self.layer,
            batch=step.batch,
            q_THK=q_THC,
            entries=part.rows,
            chosen_TA=part.chosen_TA,
            window=None,
            sinks_H=None,
            scale=self.scale,
            rate=1,
            span=0,
        )
        step.observer.indexed(indexed, attended, again=step.again)

    def reads_chosen(self, num_new: int, num_keys: int) -> bool:
        return num_new == 1 or num_keys > self.indexer.count
