"""The FLOPs of decoding one token, by part: matrices, attention over each kind of row, the indexer.

A multiply-add counts 2. Attention is counted with the key and value projections absorbed, as decoding computes it
(DeepSeek-V2, section 2.1; DeepSeek-V4, section 2.3): a score and a value for every head and every row that is read.
The indexer scores every key it holds, and thereby bounds what attention reads. Knows no device and no time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from daedal.config import ModelConfig
from daedal.cost import cached
from daedal.published_v4 import SPARSE
from daedal.shapes import Slot

ATTENTION_KINDS = ("full", "latent", "window", "sparse", "heavy")
_BF16, _FP8, _FP4 = 16, 8, 4  # bits


@dataclass(frozen=True, kw_only=True)
class DecodeFlops:
    """FLOPs of one decoded token.

    attention: by the kind of row. full: keys and values; latent: of MLA; window: the last tokens in V4; sparse and
    heavy: compressed entries, chosen and all. weighted: the total with FP8 at 1/2 and FP4 at 1/4 of bf16; matrices are
    multiplied in FP8 where the checkpoint is quantised, FP4 experts too; index keys are FP8 in V3.2, FP4 in V4.
    """

    linear: int
    attention: Mapping[str, int]
    indexer: int
    weighted: int

    @property
    def total(self) -> int:
        return self.linear + sum(self.attention.values()) + self.indexer


def decode(config: ModelConfig, cache: Iterable[Slot], *, active: int, context: int) -> DecodeFlops:
    """Counts the token that meets `active` parameters and a cache of `context` tokens."""
    linear = 2 * active
    attention = dict.fromkeys(ATTENTION_KINDS, 0)
    indexer = 0
    weighted = _weighted(linear, _BF16 if config.quantization_config is None else _FP8)
    for slot in cache:
        if slot.role != "cache":
            continue
        held = cached.rows(slot, context)
        if slot.name == "index_key":
            assert config.index_n_heads is not None
            flops = 2 * config.index_n_heads * slot.numel * held
            indexer += flops
            weighted += _weighted(flops, _FP4 if config.is_compressed else _FP8)
        else:
            kind, per_row, most = _reading(config, slot)
            flops = per_row * (held if most is None else min(held, most))
            attention[kind] += flops
            weighted += flops
    return DecodeFlops(linear=linear, attention=attention, indexer=indexer, weighted=weighted)


def _reading(config: ModelConfig, slot: Slot) -> tuple[str, int, int | None]:
    """(kind, FLOPs for each row, the most rows that are read) of a slot that attention reads."""
    heads = config.num_attention_heads
    if slot.name in ("key", "value"):
        return "full", 2 * heads * slot.shape[-1], None
    if slot.name == "latent":
        assert config.kv_lora_rank is not None
        scored_and_summed = slot.numel + config.kv_lora_rank
        return "latent", 2 * heads * scored_and_summed, config.index_topk if config.is_indexed else None
    per_row = 2 * heads * 2 * slot.numel
    if slot.name == "window":
        return "window", per_row, None
    assert slot.name == "entry"
    assert slot.layer is not None
    if config.attention_kind(slot.layer) == SPARSE:
        return "sparse", per_row, config.index_topk
    return "heavy", per_row, None


def _weighted(flops: int, bits: int) -> int:
    return flops * bits // _BF16
