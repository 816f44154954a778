"""The bytes of weights in each number format: as published, or packed as `--weights` of `daedal serve` packs them.

Says for every parameter what holding it takes, what one pass through it reads, and in which arithmetic it is
multiplied. Which parameters are packed, and in how many bytes, are the facts of `packed` that the model is held by too.
Knows no device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from daedal import packed
from daedal.config import ModelConfig
from daedal.cost import weights
from daedal.errors import ConfigError
from daedal.shapes import Slot

SHIPPED = "shipped"
WEIGHTS = (SHIPPED, *packed.WEIGHTS)
_MULTIPLIED: Mapping[str, str] = MappingProxyType(
    {"float8_e4m3fn": "fp8", "float4_e2m1fn_x2": "fp8", "int4": "w4", "fp4": "fp8"}
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """One parameter in a format. nbytes: held. read: by one pass. arithmetic: what it is multiplied in."""

    nbytes: int
    read: int
    arithmetic: str


def held(config: ModelConfig, slots: Sequence[Slot], form: str) -> Iterator[Held]:
    """Each slot in `form`, in order. An embedding is looked up, not read: 0 unless it is also the head."""
    if form not in WEIGHTS:
        raise ConfigError(f"--weights is {form!r}: it may be {', '.join(WEIGHTS)}")
    if form != SHIPPED:
        yield from (_packed(slot, config, form) for slot in slots)
        return
    for slot, published in zip(slots, weights.published(config, slots), strict=True):
        looked_up = slot.role == "hash_table" or (slot.role == "embedding" and not config.tie_word_embeddings)
        arithmetic = _MULTIPLIED.get(slot.dtype, "bf16")
        yield Held(nbytes=published.nbytes, read=0 if looked_up else published.nbytes, arithmetic=arithmetic)


def _packed(slot: Slot, config: ModelConfig, form: str) -> Held:
    """Of the keys of latent attention's expansion, which are held twice, a pass reads one of the two."""
    plain = slot.nbytes if slot.role == "hash_table" else slot.numel * (4 if slot.wide else 2)
    kept = packed.kept(slot, config, form)
    held = plain if packed.stays_plain(slot, config, form) else 0
    if not kept:
        looked_up = slot.role in ("embedding", "hash_table")
        return Held(nbytes=held, read=0 if looked_up else held, arithmetic="bf16")
    return Held(
        nbytes=held + sum(one.nbytes for one in kept),
        read=sum(one.nbytes for one in kept if one.part != "keys"),
        arithmetic=_MULTIPLIED.get(kept[0].format, kept[0].format),
    )
