"""V4's attention: a window of recent rows, and behind it entries that each stand for a group of tokens (V4, 2.3).

One row per token is key and value of all heads. Three kinds of layer: window only; compressed sparse attention (CSA),
whose entries pool two overlapping groups of a few tokens and of which an indexer chooses the best; heavily compressed
attention (HCA), whose entries pool many tokens and are all read. Queries and rows of layers with entries rotate on a
base of their own. What attention brings back is rotated by the query's position backwards, so that each row counts by
its distance. Compressors compute in float32: their gates decide what is forgotten.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.forward_pass import Attended, ForwardPass, Indexed, Observer, Turn
from daedal.model.linear import GroupedLinear, Linear, WideLinear
from daedal.model.norm import RMSNorm
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, Rows


def rotate_tail(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """The last 2 C numbers of each head rotated, in adjacent pairs."""
    plain = x_THK.shape[-1] - 2 * cos_TC.shape[-1]
    tail = ops.rotary(x_THK[..., plain:], cos_TC, sin_TC, interleaved=True)
    return torch.cat((x_THK[..., :plain], tail), -1)


class Pooling(nn.Module):
    """A compressor: x_TD to one entry of `dim` numbers for each complete group of `rate` tokens.

    overlaps: a group also pools its predecessor, through projections of its own, the first half of each matrix.
    ring, entries: the cache slots of the last tokens' rows and of what is pooled.
    """

    def __init__(self, config: ModelConfig, dim: int, layer: int, *, overlaps: bool, ring: str, entries: str):
        super().__init__()
        rate = config.compress_rate(layer)
        assert rate is not None
        self.layer, self.rate, self.dim, self.overlaps = layer, rate, dim, overlaps
        self.ring, self.entries = ring, entries
        width = 2 * dim if overlaps else dim
        self.kv_proj = WideLinear(config.hidden_size, width)
        self.gate_proj = WideLinear(config.hidden_size, width)
        self.position_bias = nn.Parameter(torch.empty(rate, width))
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)

    def pool(self, x_TD: Tensor, step: ForwardPass) -> Rows:
        """Each sequence's entries so far, [S, dim], normed and rotated to the first position of their group."""
        kv_TW, gate_TW = self.kv_proj(x_TD), self.gate_proj(x_TD)
        kept = step.cache.groups(self.layer, self.ring, self.entries)
        if kept is None:
            return self._pool_whole(kv_TW, gate_TW, step, x_TD.dtype)
        cos_TC, sin_TC = step.turn(compressed=True, rate=self.rate)
        ops.pool_groups(
            kv_TW,
            gate_TW,
            self.position_bias,
            self.kv_norm.weight,
            cos_TC,
            sin_TC,
            step.batch.starts,
            step.batch.pasts,
            kept.ring,
            kept.states,
            kept.entries,
            eps=self.kv_norm.eps,
            overlaps=self.overlaps,
        )
        return kept.entries

    def _pool_whole(self, kv_TW: Tensor, gate_TW: Tensor, step: ForwardPass, dtype: torch.dtype) -> FlatRows:
        """`ops.pool_groups` of whole sequences, with gradients: nothing is stored."""
        groups = step.groups(self.rate)
        gate_TW = gate_TW + self.position_bias[step.batch.positions_T % self.rate]
        kv_NrW, gate_NrW = kv_TW[groups.places_Nr], gate_TW[groups.places_Nr]
        if self.overlaps:
            kv_before, gate_before = kv_TW[groups.before_Nr, : self.dim], gate_TW[groups.before_Nr, : self.dim]
            gate_before = gate_before.masked_fill(groups.is_first_N[:, None, None], float("-inf"))
            kv_NrW = torch.cat((kv_before, kv_NrW[..., self.dim :]), 1)
            gate_NrW = torch.cat((gate_before, gate_NrW[..., self.dim :]), 1)
        pooled_NK = self.kv_norm((kv_NrW * gate_NrW.softmax(1)).sum(1))
        return FlatRows(rotate_tail(pooled_NK.unsqueeze(1), *groups.turn).squeeze(1).to(dtype), groups.starts)


class Scorer(nn.Module):
    """The weight of each index head for each query."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.index_n_heads is not None
        self.weights_proj = WideLinear(config.hidden_size, config.index_n_heads)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TI: Tensor = self.weights_proj(x_TD)
        return weights_TI


class EntryIndexer(Pooling):
    """Chooses entries for each query: keys are pooled as the entries are, by a narrower compressor."""

    def __init__(self, config: ModelConfig, layer: int):
        assert config.q_lora_rank is not None
        assert config.index_n_heads is not None
        assert config.index_head_dim is not None
        assert config.index_topk is not None
        super().__init__(
            config, config.index_head_dim, layer, overlaps=True, ring="index_compressor", entries="index_key"
        )
        self.heads, self.count = config.index_n_heads, config.index_topk
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.scorer = Scorer(config)

    def forward(self, x_TD: Tensor, query_TL: Tensor, step: ForwardPass) -> tuple[Tensor | None, Indexed]:
        """chosen_TA, None where all is to be read. A query with no more than `count` entries chooses them all."""
        keys = self.pool(x_TD, step)
        q_TIK = rotate_tail(self.q_b_proj(query_TL).unflatten(-1, (self.heads, self.dim)), *step.turn(compressed=True))
        weights_TI = self.scorer(x_TD) * (self.heads * self.dim) ** -0.5
        indexed = Indexed(layer=self.layer, q_TIK=q_TIK, weights_TI=weights_TI, keys=keys, rate=self.rate)
        return (None if step.reads_all else indexed.choose(step.batch, self.count)), indexed


class Compressor(Pooling):
    """The entries of a layer, which of them each query reads, None for all, and how they were scored."""

    def __init__(self, config: ModelConfig, layer: int, *, overlaps: bool):
        super().__init__(config, config.head_dim, layer, overlaps=overlaps, ring="compressor", entries="entry")
        self.indexer = EntryIndexer(config, layer) if overlaps else None

    def forward(self, x_TD: Tensor, query_TL: Tensor, step: ForwardPass) -> tuple[Rows, Tensor | None, Indexed | None]:
        entries = self.pool(x_TD, step)
        if self.indexer is None:
            return entries, None, None
        return entries, *self.indexer(x_TD.detach(), query_TL.detach(), step)


class CompressedAttention(nn.Module):
    """x_TD to y_TD. `layer` is the layer's index, by which it names its cache slots."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.q_lora_rank is not None
        assert config.o_groups is not None
        assert config.o_lora_rank is not None
        assert config.sliding_window is not None
        self.layer, self.heads, self.dim, self.eps = (
            layer,
            config.num_attention_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        self.span, self.rate = config.sliding_window, config.compress_rate(layer) or 1
        hidden, rank = config.hidden_size, config.q_lora_rank
        self.q_a_proj = Linear(hidden, rank, bias=False)
        self.q_a_norm = RMSNorm(rank, self.eps)
        self.q_b_proj = Linear(rank, self.heads * self.dim, bias=False)
        self.kv_proj = Linear(hidden, self.dim, bias=False)
        self.kv_norm = RMSNorm(self.dim, self.eps)
        groups = config.o_groups
        self.o_a_proj = GroupedLinear(groups, self.heads * self.dim // groups, config.o_lora_rank)
        self.o_b_proj = Linear(groups * config.o_lora_rank, hidden, bias=False)
        self.sinks = nn.Parameter(torch.empty(self.heads))
        kind = config.attention_kind(layer)
        overlaps = kind == "compressed_sparse_attention"
        self.compressor = None if kind == "sliding_attention" else Compressor(config, layer, overlaps=overlaps)

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        cos, sin = turn = step.turn(compressed=self.compressor is not None)
        query_TL = self.q_a_norm(self.q_a_proj(x_TD))
        q_THK = self._queries(query_TL, turn)
        row_T1K = self.kv_norm(self.kv_proj(x_TD)).unsqueeze(1)
        window = step.cache.recent(self.layer, "window", rotate_tail(row_T1K, *turn).squeeze(1))
        entries, chosen_TA, indexed = (None, None, None)
        if self.compressor is not None:
            entries, chosen_TA, indexed = self.compressor(x_TD, query_TL, step)
        if step.observer is not None and indexed is not None and entries is not None:
            self._show(q_THK, entries, chosen_TA, window, indexed, step, step.observer)
        o_THK = ops.sparse_attention(
            q_THK,
            step.batch.starts,
            step.batch.pasts,
            entries,
            chosen_TA,
            window,
            self.sinks,
            value_dim=self.dim,
            scale=self.dim**-0.5,
            rate=self.rate,
            span=self.span,
        )
        if isinstance(entries, FlatRows):
            # Where no group is complete, nothing reads the compressor: its gradient is then zero, and not absent.
            o_THK = o_THK + entries.rows[:0].sum()
        o_TGC = rotate_tail(o_THK, cos, -sin).unflatten(1, (self.o_a_proj.groups, -1)).flatten(2)
        y_TD: Tensor = self.o_b_proj(self.o_a_proj(o_TGC))
        return y_TD

    def _show(
        self,
        q_THK: Tensor,
        entries: Rows,
        chosen_TA: Tensor | None,
        window: Rows | RingRows,
        indexed: Indexed,
        step: ForwardPass,
        observer: Observer,
    ) -> None:
        attended = Attended(
            layer=self.layer,
            batch=step.batch,
            q_THK=q_THK,
            entries=entries,
            chosen_TA=chosen_TA,
            window=window,
            sinks_H=self.sinks,
            scale=self.dim**-0.5,
            rate=self.rate,
            span=self.span,
        )
        observer.indexed(indexed, attended, again=step.again)

    def _queries(self, query_TL: Tensor, turn: Turn) -> Tensor:
        q_THK = self.q_b_proj(query_TL).unflatten(-1, (self.heads, self.dim))
        return rotate_tail(ops.rms_norm(q_THK, None, self.eps), *turn)
