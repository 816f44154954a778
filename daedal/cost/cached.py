"""The bytes that one sequence leaves in the cache, as shipped and in bf16, beside ordinary attention.

Rows that attention reads: those that stay, one per token or per compressed entry, and rings of the last few tokens.
What only closes the next entry is state, apart from them. The engine sizes its pages and rings by the same functions,
so what is predicted is what is allocated, but for rounding up to pages. Knows no device.
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import partial
from types import MappingProxyType

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.shapes import DTYPE_BITS, Slot, eight_bit_row

COMPARED_HEADS = 8  # of the grouped-query model that a cache is compared with
COMPARED_WIDTH = 128  # of its heads, where the model's own rows belong to no head

Size = Callable[[Slot], int]


def as_shipped(slot: Slot) -> int:
    """Bytes of one row as the publisher's engine stores it."""
    return slot.nbytes


def in_numbers(itemsize: int, slot: Slot) -> int:
    """Bytes of one row in numbers of so many bytes; what is kept wide has at least 4."""
    return slot.numel * (max(itemsize, 4) if slot.wide else itemsize)


def in_eight_bits(itemsize: int, slot: Slot) -> int:
    """Bytes of one row with what may be kept in eight bits so, the rest in numbers of so many bytes."""
    if slot.exact is None:
        return in_numbers(itemsize, slot)
    return eight_bit_row(slot.numel - slot.exact, slot.exact)


in_bf16: Size = partial(in_numbers, 2)
in_fp8: Size = partial(in_eight_bits, 2)


def in_six_bits(slot: Slot) -> int:
    """Bytes of one row with six bits for each number, as DeepSeek-V2 was deployed (V2, section 3.2.3)."""
    return -(-6 * slot.numel // 8)


KV_DTYPES: Mapping[str, Size] = MappingProxyType(
    {"auto": as_shipped, "bf16": in_bf16, "fp8": in_fp8, "6bit": in_six_bits}
)


def size_of(kv_dtype: str, cache: Iterable[Slot]) -> Size:
    """The size of rows in a format; ConfigError for one that does not exist, or that packs nothing of this cache."""
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"--kv-cache-dtype is {kv_dtype!r}: it may be {', '.join(KV_DTYPES)}")
    if kv_dtype == "fp8" and all(slot.exact is None for slot in cache):
        raise ConfigError(
            "--kv-cache-dtype fp8 packs the rows of latent attention, and this model keeps keys and values of each "
            "head: use auto or bf16"
        )
    return KV_DTYPES[kv_dtype]


def rows(slot: Slot, context: int) -> int:
    """Rows of a slot that attention can read once a sequence has `context` tokens; entries count when complete."""
    return min(context, slot.ring) if slot.ring else context // slot.rate


def per_token(cache: Iterable[Slot], size: Size) -> float:
    """Bytes that each further token adds, on average over entries; rings do not grow. Whole numbers as int."""
    grows = (slot for slot in cache if slot.role == "cache" and not slot.ring)
    total = sum((Fraction(size(slot), slot.rate) for slot in grows), Fraction(0))
    return total.numerator if total.denominator == 1 else float(total)


def at_context(cache: Iterable[Slot], context: int, size: Size) -> int:
    """Bytes that attention can read at `context` tokens, rings included."""
    return sum(rows(slot, context) * size(slot) for slot in cache if slot.role == "cache")


def state(cache: Iterable[Slot]) -> int:
    """Bytes of what the next entries are made of: the same at every length."""
    return sum(slot.ring * slot.nbytes for slot in cache if slot.role == "state")


def page_bytes(cache: Iterable[Slot], page_size: int, size: Size) -> int:
    """Bytes of a page of so many tokens, which must be whole rows, over all layers: what stays."""
    return sum(page_size // slot.rate * size(slot) for slot in cache if not slot.ring)


def ring_bytes(cache: Iterable[Slot], size: Size, *, rewind: int = 0) -> int:
    """Bytes of one sequence's rings over all layers, each `rewind` rows longer than what is read: windows and state."""
    return sum((slot.ring + rewind) * size(slot) for slot in cache if slot.ring)


def ordinary_per_token(config: ModelConfig, heads: int) -> int:
    """Bytes per token of the same layers with keys and values of `heads` heads each, in the model's own dtype.

    The dtype is that of the unquantised parts: bf16 also where the cache is shipped in FP8.
    """
    if config.is_compressed:
        width = COMPARED_WIDTH
    else:
        width = config.head_dim if config.v_head_dim is None else config.v_head_dim
    return config.num_hidden_layers * heads * 2 * width * DTYPE_BITS[config.dtype] // 8


def compared_heads(config: ModelConfig) -> int:
    """Key heads of the grouped-query model: 8, or all of them where the model has fewer."""
    return min(COMPARED_HEADS, config.num_attention_heads)
