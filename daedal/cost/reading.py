"""What attention reads of the cache: how many rows of each slot, and the multiply-adds that one row costs one token.

The one place where these formulas stand: decoding, reading a prompt and training all count from it. Latent rows have
two forms: absorbed, as decoding computes them, and expanded into keys and values, as long prompts and training do
(DeepSeek-V2, section 2.1; DeepSeek-V4, section 2.3). The indexer scores every key it holds, and thereby bounds what
attention reads. Knows no batch, no device and no time.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from daedal import shapes
from daedal.config import ModelConfig
from daedal.cost import cached
from daedal.published_v4 import SPARSE
from daedal.shapes import Slot

ATTENTION_KINDS = ("full", "latent", "window", "sparse", "heavy")
INDEXER = "indexer"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One slot of the cache as a token meets it.

    kind: of row. full: keys or values of heads; latent: of MLA; window: the last tokens in V4; sparse and heavy:
    compressed entries, chosen and all; indexer: its keys. absorbed, expanded: multiply-adds of one token and one row.
    expansion: multiply-adds that turn a row of earlier steps into keys and values again. most: rows that are read at
    most, None for all that are held. arithmetic: the format that is multiplied in.
    """

    slot: Slot
    kind: str
    absorbed: int
    expanded: int
    expansion: int = 0
    most: int | None = None
    arithmetic: str = "bf16"

    def rows(self, context: int) -> int:
        """Rows that the token at position `context`, counted from 1, reads."""
        held = cached.rows(self.slot, context)
        return held if self.most is None else min(held, self.most)

    def rows_up_to(self, context: int) -> int:
        """The rows that all tokens of a sequence of `context` tokens read, added up."""
        rate = 1 if self.slot.ring else self.slot.rate
        limits = [limit for limit in (self.slot.ring or None, self.most) if limit is not None]
        grown = min(context, rate * min(limits)) if limits else context
        whole, rest = divmod(grown, rate)
        growing = rate * whole * (whole - 1) // 2 + whole * (rest + 1)
        return growing + (context - grown) * (grown // rate)

    def cheapest(self, read: float, past: float) -> float:
        """Multiply-adds of a step whose tokens read so many rows one after another, `past` different ones of them left
        by earlier steps, in the form that costs less.
        """
        if self.absorbed == self.expanded:
            return self.absorbed * read
        return min(self.absorbed * read, self.expanded * read + self.expansion * past)


def readings(config: ModelConfig, *, drafting: bool = False) -> Mapping[Reading, int]:
    """Every reading of a token and in how many layers it occurs; with `drafting` also in the drafting modules."""
    slots = (slot for slot in shapes.cache(config, drafting=drafting) if slot.role == "cache")
    return Counter(_reading(config, slot) for slot in slots)


def _reading(config: ModelConfig, slot: Slot) -> Reading:
    heads, nowhere = config.num_attention_heads, replace(slot, layer=None)
    if slot.name == "index_key":
        assert config.index_n_heads is not None
        scored = config.index_n_heads * slot.numel
        arithmetic = "fp4" if config.is_compressed else "fp8"
        return Reading(slot=nowhere, kind=INDEXER, absorbed=scored, expanded=scored, arithmetic=arithmetic)
    if slot.name == "latent":
        assert config.kv_lora_rank is not None
        absorbed = heads * (slot.numel + config.kv_lora_rank)
        if config.is_indexed:
            return Reading(slot=nowhere, kind="latent", absorbed=absorbed, expanded=absorbed, most=config.index_topk)
        assert config.v_head_dim is not None
        assert config.qk_nope_head_dim is not None
        expanded = heads * (config.head_dim + config.v_head_dim)
        expansion = heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        return Reading(slot=nowhere, kind="latent", absorbed=absorbed, expanded=expanded, expansion=expansion)
    if slot.name in ("key", "value"):
        work = heads * slot.shape[-1]
        return Reading(slot=nowhere, kind="full", absorbed=work, expanded=work)
    work = 2 * heads * slot.numel
    if slot.name == "window":
        return Reading(slot=nowhere, kind="window", absorbed=work, expanded=work)
    assert slot.name == "entry"
    assert slot.layer is not None
    if config.attention_kind(slot.layer) == SPARSE:
        return Reading(slot=nowhere, kind="sparse", absorbed=work, expanded=work, most=config.index_topk)
    return Reading(slot=nowhere, kind="heavy", absorbed=work, expanded=work)
