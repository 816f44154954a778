"""Parameters by role: how many there are, how many a token meets, and the bytes of them as shipped.

Counts from the lists of `shapes`, and bytes from the published tensors that `layouts` makes of them. Hash tables are
data: they have bytes but are no parameters. Opens no file and knows no context.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from daedal import layouts
from daedal.config import ModelConfig
from daedal.shapes import ROLES, Slot

PARAMETER_ROLES = tuple(role for role in ROLES if role not in ("hash_table", "draft", "cache", "state"))
WEIGHT_ROLES = (*PARAMETER_ROLES, "hash_table")


def params_by_role(slots: Iterable[Slot]) -> dict[str, int]:
    """Parameters of each role, 0 for what the backbone does not have."""
    result = dict.fromkeys(PARAMETER_ROLES, 0)
    for slot in slots:
        if slot.role != "hash_table":
            result[slot.role] += slot.numel
    return result


def bytes_by_role(config: ModelConfig, slots: Sequence[Slot]) -> dict[str, int]:
    """Bytes of each role as shipped, 0 for what the backbone does not have."""
    result = dict.fromkeys(WEIGHT_ROLES, 0)
    for slot, held in zip(slots, published(config, slots), strict=True):
        result[slot.role] += held.nbytes
    return result


def checkpoint_tensors(config: ModelConfig, slots: Iterable[Slot], *, drafting: bool) -> int:
    """How many tensors the published files of `slots` have, scales counted; `drafting` where the slots include it.

    It is what `layouts.tensor_count` finds by listing every tensor, which takes longer than the rest of a report.
    """
    beside = [*layouts.empty_pieces(config, drafting=drafting), *(layouts.copies(config) if drafting else ())]
    return sum(held.tensors for held in published(config, slots)) + len(beside)


class Published(NamedTuple):
    """What one slot is in the published files, scales included."""

    tensors: int
    nbytes: int


def published(config: ModelConfig, slots: Iterable[Slot]) -> Iterator[Published]:
    """Each slot's tensors and bytes, in order."""
    layout = layouts.choose(config, None)
    known: dict[tuple[object, ...], Published] = {}
    for slot in slots:
        # Layers repeat each other, and taking 384 experts apart once is enough.
        alike = (slot.role, slot.name.rpartition(".")[2], slot.shape, slot.dtype)
        if alike not in known:
            pieces = list(layouts.pieces(slot, config, layout))
            tensors = sum(1 if piece.scale is None else 2 for piece in pieces)
            known[alike] = Published(tensors, sum(piece.nbytes for piece in pieces))
        yield known[alike]


def bf16_bytes(slots: Iterable[Slot]) -> int:
    """Bytes with every parameter in bf16; hash tables as they are."""
    return sum(slot.nbytes if slot.role == "hash_table" else 2 * slot.numel for slot in slots)


def active_params(config: ModelConfig, slots: Iterable[Slot]) -> int:
    """Parameters that one token is multiplied with. A tied embedding counts once: as the head."""
    active = 0
    for slot in slots:
        if slot.role == "routed_expert":
            active += slot.numel // slot.shape[0] * config.num_experts_per_tok
        elif slot.role != "hash_table" and (slot.role != "embedding" or config.tie_word_embeddings):
            active += slot.numel
    return active
